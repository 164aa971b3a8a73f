"""Spoken digits: recordings, strings of them, and questions about what is heard.

Waves are mono float32 in [-1, 1], (samples,); rates are samples per second (Hz), durations seconds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
from numpy.random import Generator

from modalora.data.files import load_arrow
from modalora.data.numbers import DIGITS, number_words
from modalora.data.variation import augment, resample, stretch
from modalora.errors import DataError

TRANSCRIBE = "Transcribe the audio clip into text."
PARAPHRASES = (
    "Transcribe the recording.",
    "Write down the digits you hear.",
    "Which digits are spoken in this clip?",
    "What is said in the audio?",
)


@dataclass(frozen=True, eq=False)
class Clip:
    """A sound and what is said in it. wave: (samples,); rate: Hz; speaker: a name, empty for several at once."""

    wave: np.ndarray
    rate: int
    words: tuple[str, ...]
    speaker: str = ""

    @cached_property
    def text(self) -> str:
        """The words, one space apart."""
        return " ".join(self.words)


def spoken_digits(folder: Path, split: str, *, without: str | None = None, only: str | None = None) -> list[Clip]:
    """Return the recordings of a split, each with its one word and its speaker.

    folder: the data folder, which holds spoken_digits/train.parquet and spoken_digits/validation.parquet.
    without: a speaker left out; only: the one speaker kept.
    Raises DataError when the file is missing or nobody has the name.
    """
    path = Path(folder) / "spoken_digits" / f"{split}.parquet"
    if not path.is_file():
        raise DataError(
            f"no {path}: split={split!r} needs a parquet file with the columns audio (WAV bytes), digit (0-9) and "
            "speaker; the Free Spoken Digit Dataset comes as train.parquet and validation.parquet"
        )
    table = load_arrow().parquet.read_table(path, columns=["audio", "digit", "speaker"])
    speakers = table["speaker"].to_pylist()
    for name in (without, only):
        if name is not None and name not in speakers:
            raise DataError(f"{path} has no speaker {name!r}; it has {', '.join(sorted(set(speakers)))}")
    clips: list[Clip] = []
    for audio, digit, speaker in zip(table["audio"].to_pylist(), table["digit"].to_pylist(), speakers, strict=True):
        if speaker != without and only in (None, speaker):
            wave, rate = read_wave(audio)
            clips.append(Clip(wave, rate, (DIGITS[digit],), speaker))
    return clips


def by_text(clips: Sequence[Clip]) -> dict[str, list[Clip]]:
    """Return clips by what is said in them."""
    found: dict[str, list[Clip]] = {}
    for clip in clips:
        found.setdefault(clip.text, []).append(clip)
    return found


def read_wave(data: bytes) -> tuple[np.ndarray, int]:
    """Return the mono wave in a sound file's bytes, and its rate in Hz."""
    try:
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    except soundfile.LibsndfileError as error:
        raise DataError(f"{len(data)} bytes are not a sound file ({error}); WAV works") from error
    return (wave if wave.ndim == 1 else wave.mean(axis=1)), int(rate)


def digit_string(
    rows: Sequence[Clip],
    rng: Generator,
    low: int = 1,
    high: int = 7,
    augmented: bool = True,
) -> Clip:
    """Return low to high random digits in one clip, with pauses of 0 to 0.5 s or none, mostly of one speaker.

    With augmented=False (validation) the recordings are joined as they are, at the rate of the first. Otherwise levels
    and tempo vary a little from digit to digit, the whole is augmented, and a clip of 8 kHz at times has another rate.
    """
    if not rows or not 1 <= low <= high:
        raise DataError(f"{len(rows)} rows, low={low}, high={high}: at least one row and 1 <= low <= high are needed")
    anchor = rows[int(rng.integers(len(rows)))]
    pool = rows if rng.random() < 0.15 else [row for row in rows if row.speaker == anchor.speaker]
    chosen = [pool[index] for index in rng.integers(len(pool), size=int(rng.integers(low, high + 1)))]
    native = max(row.rate for row in chosen) if augmented else chosen[0].rate
    target = _draw_rate(native, rng) if augmented else native
    rate = target if target < native or rng.random() < 0.5 else native  # where the digits meet the augmentation
    longest = 0.0 if rng.random() < 0.2 else rng.uniform(0.05, 0.5)
    pieces: list[np.ndarray] = []
    for row in chosen:
        if pieces:
            pieces.append(np.zeros(int(rng.uniform(0, longest) * rate), dtype=np.float32))
        wave = resample(row.wave, row.rate, rate)
        if augmented and len(chosen) > 1:
            wave = wave * np.float32(10 ** (rng.uniform(-3, 3) / 20))
            if rng.random() < 0.3:
                wave = stretch(wave, rate, rng.uniform(0.85, 1.2))
        pieces.append(_soften(wave, rate))
    wave = np.concatenate(pieces)
    if augmented:
        wave = np.clip(resample(augment(wave, rate, rng), rate, target), -1.0, 1.0)
    speaker = anchor.speaker if all(row.speaker == anchor.speaker for row in chosen) else ""
    return Clip(wave, target, tuple(word for row in chosen for word in row.words), speaker)


def _draw_rate(native: int, rng: Generator) -> int:
    """The rate a clip is handed over at: mostly its own, at times the other of 8 and 16 kHz, seldom a rate of music."""
    draw = rng.random()
    if draw < 0.65:
        return native
    return (16_000 if native < 16_000 else 8_000) if draw < 0.88 else int(rng.choice((11_025, 22_050, 44_100)))


def _soften(wave: np.ndarray, rate: int) -> np.ndarray:
    """The wave with its ends faded over 3 ms, so that a joint does not click."""
    ramp = np.linspace(0, 1, max(1, min(round(0.003 * rate), len(wave) // 2)), dtype=np.float32)
    wave = wave.copy()
    wave[: len(ramp)] *= ramp
    wave[len(wave) - len(ramp) :] *= ramp[::-1]
    return wave


def speech_questions(clip: Clip, rng: Generator) -> list[tuple[str, str]]:
    """Return instructions about a digit clip with their answers, the plain transcription first.

    Each wording belongs to one question only, so the instruction alone says which answer is wanted.
    Raises DataError for a clip with no words, other words than digits, or more than eleven (their sum may pass 99).
    """
    if not 1 <= len(clip.words) <= 11 or any(word not in DIGITS for word in clip.words):
        raise DataError(f"words={clip.words} must be 1 to 11 digit words, such as ('three', 'seven')")
    values = [DIGITS.index(word) for word in clip.words]
    sought = clip.words[rng.integers(len(values))] if rng.random() < 0.5 else DIGITS[rng.integers(10)]
    absent = [word for word in DIGITS if word not in clip.words]
    if sought not in absent and rng.random() < 0.4 and absent:
        sought = absent[rng.integers(len(absent))]
    questions = [
        (PARAPHRASES, clip.text),
        (("What is the first digit?", "Which digit is spoken first?"), clip.words[0]),
        (("What is the last digit?", "Which digit is spoken last?"), clip.words[-1]),
        (("How many digits are spoken?", "How many words are spoken?"), number_words(len(values))),
        (("Add the numbers.", "What is the sum of the digits?"), number_words(sum(values))),
        (("What is the largest digit?", "Which spoken digit is the highest?"), DIGITS[max(values)]),
        (("What is the smallest digit?", "Which spoken digit is the lowest?"), DIGITS[min(values)]),
        ((f"Is there a {sought}?", f"Is the digit {sought} spoken?"), "yes" if sought in clip.words else "no"),
        (("Say the digits backwards.", "Write the digits in reverse order."), " ".join(clip.words[::-1])),
    ]
    asked = [(str(rng.choice(wordings)), answer) for wordings, answer in questions]
    return [(TRANSCRIBE, clip.text), *asked]
