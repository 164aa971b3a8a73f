"""Synthetic voices: espeak-ng says digits and short sentences once, a file keeps them.

Waves are mono float32 in [-1, 1], (samples,); rates are samples per second (Hz); speed is words per minute.
Formant synthesis sounds like nobody, but its variants span vocal tracts, pitches and accents that few speakers do.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.random import Generator

from modalora.data.numbers import DIGITS, number_words
from modalora.data.scenes import BOX_NAMES
from modalora.data.speech import Clip, read_wave
from modalora.data.variation import resample
from modalora.disk import drafted
from modalora.errors import DataError

ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-us-nyc",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
)
MEN = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "adam", "Alex", "Andy", "boris", "caleb", "Michael", "klatt", "klatt3")
WOMEN = ("f1", "f2", "f3", "f4", "f5", "Annie", "steph", "steph3", "linda", "belinda", "Alicia", "Andrea", "aunty")
VARIANTS = (*MEN, *WOMEN, "grandma", "grandpa", "croak")
RATE = 16_000  # Hz, of the clips in a bank
BANK_FORMAT = 1  # raised when what a request gives changes, so that old files are not taken for new ones
FRAME_SECONDS, QUIET = 0.01, 0.02  # trimming: frames under this share of the loudest one are silence


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker. speed: words per minute, 80 to 450; pitch: 0 to 99, of the variant's own range."""

    name: str
    speed: int = 160
    pitch: int = 50


def draw_voices(count: int = 48) -> tuple[Voice, ...]:
    """Return different voices over all accents and variants, each with its own speed and pitch."""
    rng = np.random.default_rng(0)
    names = [
        f"{ACCENTS[(place + place // len(VARIANTS)) % len(ACCENTS)]}+{VARIANTS[place % len(VARIANTS)]}"
        for place in range(count)
    ]
    return tuple(Voice(name, int(rng.integers(115, 205)), int(rng.integers(15, 85))) for name in names)


VOICES = draw_voices()


def espeak(text: str, *, voice: str, speed: int, pitch: int) -> Clip:
    """Return the text said by espeak-ng, at the rate it speaks in (22,050 Hz).

    voice: an accent with or without a variant, "en-gb+f2"; speed: words per minute; pitch: 0 to 99.
    Raises DataError when the program is missing or refuses the voice.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise DataError("espeak-ng is not on PATH; install espeak-ng with your system's package manager")
    command = [program, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdin", "--stdout"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode or len(done.stdout) <= 44:  # a WAV header alone
        reason = done.stderr.decode(errors="replace").strip() or "it gave no sound"
        raise DataError(f"espeak-ng did not say {text!r} as voice={voice!r}: {reason}; the voice en-us works")
    wave, rate = read_wave(done.stdout)
    return Clip(wave, rate, tuple(text.split()), f"{voice} {speed} {pitch}")


def voice_bank(
    texts: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    voices: Sequence[Voice] = VOICES,
    takes: int | None = None,
) -> list[Clip]:
    """Return each text said by `takes` of the voices drawn by the seed, or by every voice when takes is None.

    Silence at the ends is trimmed. The clips, at 16 kHz, are kept in one file under `folder` named by the request:
    the first call synthesises (about 10 ms a clip), later calls read the file.
    """
    if not voices or (takes is not None and not 1 <= takes <= len(voices)):
        raise DataError(f"takes={takes} must lie in 1..{len(voices)}, the number of voices")
    request = json.dumps([BANK_FORMAT, list(texts), [asdict(voice) for voice in voices], takes, seed, RATE])
    path = Path(folder) / f"voices-{hashlib.sha256(request.encode()).hexdigest()[:16]}.npz"
    if not path.is_file():
        _write_bank(path, _synthesise(texts, voices, takes, np.random.default_rng(seed)))
    return _read_bank(path)


def _synthesise(texts: Sequence[str], voices: Sequence[Voice], takes: int | None, rng: Generator) -> list[Clip]:
    clips: list[Clip] = []
    for text in texts:
        chosen = range(len(voices)) if takes is None else rng.choice(len(voices), takes, replace=False)
        for voice in (voices[index] for index in chosen):
            said = espeak(text, voice=voice.name, speed=voice.speed, pitch=voice.pitch)
            clips.append(Clip(trim(resample(said.wave, said.rate, RATE), RATE), RATE, said.words, said.speaker))
    return clips


def trim(wave: np.ndarray, rate: int) -> np.ndarray:
    """Return the wave without the silence at its ends, keeping 10 ms of it."""
    size = round(FRAME_SECONDS * rate)
    count = len(wave) // size
    if count == 0:
        return wave
    levels = np.sqrt(np.square(wave[: count * size].reshape(count, size)).mean(axis=1))
    heard = np.flatnonzero(levels > QUIET * levels.max())
    return wave[max(0, heard[0] - 1) * size : (heard[-1] + 2) * size] if len(heard) else wave


def _write_bank(path: Path, clips: Sequence[Clip]) -> None:
    waves = [np.rint(np.clip(clip.wave, -1, 1) * 32_767).astype(np.int16) for clip in clips]
    with drafted(path) as draft:
        np.savez(
            draft,
            samples=np.concatenate(waves) if waves else np.zeros(0, np.int16),
            lengths=np.array([len(wave) for wave in waves], dtype=np.int64),
            rates=np.array([clip.rate for clip in clips], dtype=np.int64),
            texts=np.array([clip.text for clip in clips], dtype=np.str_),
            speakers=np.array([clip.speaker for clip in clips], dtype=np.str_),
        )


def _read_bank(path: Path) -> list[Clip]:
    with np.load(path, allow_pickle=False) as bank:
        samples, lengths, rates = bank["samples"], bank["lengths"], bank["rates"]
        texts, speakers = bank["texts"].tolist(), bank["speakers"].tolist()
    waves = np.split(samples.astype(np.float32) / 32_767, np.cumsum(lengths)[:-1]) if len(lengths) else []
    return [
        Clip(wave, int(rate), tuple(text.split()), speaker)
        for wave, rate, text, speaker in zip(waves, rates, texts, speakers, strict=True)
    ]


def digit_voices(folder: Path) -> list[Clip]:
    """Return the ten digits said by every voice: rows like those of `spoken_digits`, at 16 kHz."""
    return voice_bank(DIGITS, folder)


def sentence_voices(folder: Path, split: str = "train") -> list[Clip]:
    """Return the sentences of a split with their transcripts, at 16 kHz: three voices each, for validation one."""
    return voice_bank(sentences(split), folder, seed=1, takes=3 if split == "train" else 1)


def question_voices(folder: Path, split: str = "train") -> list[Clip]:
    """Return the questions about pictures of a split, at 16 kHz: five voices each."""
    return voice_bank(picture_questions(split), folder, seed=2, takes=5)


def sentences(split: str = "train") -> tuple[str, ...]:
    """Return short lower-case sentences without punctuation; every tenth is kept for validation."""
    return _part(_all_sentences(), split)


def picture_questions(split: str = "train") -> tuple[str, ...]:
    """Return questions as data.questions writes them, lower case, without their mark; every tenth for validation.

    None is a sentence of the other split.
    """
    nouns = ("object", "thing", "item", "shape", "block", "circle", "square", "triangle")
    colors, sizes = ("black ", "blue ", "yellow ", "red ", "green "), ("small ", "medium ", "large ")
    many = [f"{color}{noun}s" for color, noun in product(("", *colors), nouns)]
    texts = [f"how many {things} are there" for things in many]
    texts += [f"how many {things} are in the {box}" for things, box in product(many[:32], BOX_NAMES)]
    texts += [f"what color is the {size}{noun}" for size, noun in product(("", *sizes), nouns)]
    texts += [f"what color is the {place} block in the {box}" for place, box in product(("top", "bottom"), BOX_NAMES)]
    texts += [f"where is the {pick}{noun}" for pick, noun in product((*colors, *sizes), nouns)]
    texts += [
        f"where is the tower with a {color}block at the {end}" for color, end in product(colors[:3], ("top", "base"))
    ]
    wanted = _part(texts, split)
    taken = sentences("train" if split == "validation" else "validation")
    return tuple(text for text in wanted if text not in taken)


def _part(texts: Sequence[str], split: str) -> tuple[str, ...]:
    """Every tenth for validation, the rest for training."""
    if split not in ("train", "validation"):
        raise DataError(f"split={split!r} must be train or validation")
    return tuple(text for place, text in enumerate(texts) if (place % 10 == 9) == (split == "validation"))


def _all_sentences() -> list[str]:
    colors = ("red", "blue", "green", "yellow", "black")
    shapes = ("circle", "square", "triangle")
    numbers = [number_words(number) for number in range(1, 21)]
    texts = [f"how many {color} {shape}s are there" for color, shape in product(colors, shapes)]
    texts += [
        f"how many {word} are there" for word in ("shapes", "circles", "squares", "triangles", "boxes", "objects")
    ]
    texts += [f"what color is the {size}{shape}" for size, shape in product(("", "large ", "small "), shapes)]
    texts += [f"is there a {color} {shape} in the picture" for color, shape in product(colors, shapes)]
    texts += [f"where is the {color} {shape}" for color, shape in product(colors, shapes)]
    texts += [
        f"is the {color} {shape} {place} the {other} {shape}"
        for (color, other), shape, place in product(
            (("red", "blue"), ("yellow", "black"), ("green", "red")), shapes, ("above", "below", "left of", "right of")
        )
    ]
    texts += [f"turn {way} the {thing}" for way, thing in product(("on", "off"), ("light", "radio", "heating", "fan"))]
    texts += [f"{verb} the {thing}" for verb, thing in product(("open", "close"), ("door", "window", "box", "book"))]
    texts += [
        f"{verb} my {who}" for verb, who in product(("call", "write to"), ("mother", "father", "friend", "sister"))
    ]
    texts += [f"set a timer for {number} minutes" for number in numbers[1:]]
    texts += [f"wake me up at {number}" for number in numbers[4:12]]
    texts += [f"the number is {number}" for number in numbers]
    texts += [f"i have {number} {thing}" for number, thing in zip(numbers[1:], ("apples", "books", "friends") * 7)]  # noqa: B905
    texts += [f"what is {left} plus {right}" for left, right in zip(numbers[:10], numbers[6:16], strict=True)]
    texts += [f"what is {left} minus {right}" for left, right in zip(numbers[9:19], numbers[:10], strict=True)]
    texts += [f"draw a {color} {shape}" for color, shape in product(colors, shapes)]
    texts += [
        f"tell me a {kind} about {topic}" for kind, topic in product(("story", "joke"), ("dogs", "cats", "trains"))
    ]
    texts += [
        f"the {animal} is {state}" for animal, state in product(("dog", "cat", "bird"), ("big", "asleep", "happy"))
    ]
    texts += [f"it is {weather} today" for weather in ("cold", "warm", "sunny", "raining", "windy")]
    texts += SMALL_TALK
    return list(dict.fromkeys(texts))


SMALL_TALK = (
    "hello how are you",
    "good morning",
    "good evening",
    "good night and sleep well",
    "what is your name",
    "my name is anna",
    "where do you live",
    "how old are you",
    "i am fine thank you",
    "nice to meet you",
    "what time is it",
    "what day is it today",
    "thank you very much",
    "you are welcome",
    "see you tomorrow",
    "please say that again",
    "i do not understand",
    "can you help me",
    "can you hear me now",
    "yes please",
    "no thank you",
    "i am hungry",
    "let us go home",
    "what can you do",
    "describe the picture",
    "what is in the picture",
    "what do you see",
    "read the text to me",
    "play some music",
    "stop the music",
    "where is the train station",
    "how much does it cost",
    "the sun is shining",
    "i like this song",
    "we will meet at the station",
    "she went to school by bus",
    "he reads a book every evening",
    "they live in a small house",
    "the water is cold and clear",
    "please close the door behind you",
)
