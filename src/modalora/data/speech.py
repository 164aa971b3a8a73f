"""Spoken digits: recordings, variations that stand in for unseen speakers and rooms, strings, and questions about them.

Waves are mono float32 in [-1, 1], (samples,); rates are samples per second (Hz), levels dB, durations seconds.
A speaker nobody recorded differs mostly in the length of the vocal tract, which scales the formants, then in pitch
and tempo. `augment` draws the three apart: resampling scales pitch and formants together (vocal tract length
perturbation in the time domain), a warp of the cepstral envelope moves the formants alone, and WSOLA (Verhelst and
Roelands, ICASSP 1993) sets the duration. What a channel does to the sound is one product in the frequency domain.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy import fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.random import Generator

from modalora.data.files import load_arrow
from modalora.errors import DataError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
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

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.wave) / self.rate

    @cached_property
    def text(self) -> str:
        """The words, one space apart."""
        return " ".join(self.words)


@dataclass(frozen=True, kw_only=True)
class Variation:
    """How far `augment` may go: a (low, high) range is drawn from evenly, a chance is the share of clips changed."""

    voice_chance: float = 0.85  # clips whose pitch and formants change
    pitch: tuple[float, float] = (0.75, 1.35)  # factor of pitch, drawn in the logarithm
    formants: tuple[float, float] = (0.82, 1.25)  # factor of the formants where they move apart from the pitch
    formants_chance: float = 0.5  # else the formants go with the pitch, as plain resampling does
    tempo: tuple[float, float] = (0.75, 1.35)  # factor of the speed where it is drawn apart from the pitch
    tempo_chance: float = 0.6  # else a higher pitch is faster, as plain resampling does
    silence: tuple[float, float] = (0.0, 0.3)  # seconds before, and again after
    silence_chance: float = 0.6
    channel_chance: float = 0.7  # clips with tilt, equaliser and band limits
    tilt_db: tuple[float, float] = (-4.0, 4.0)  # dB per octave around 1 kHz, at most 3 octaves of it
    equaliser_db: float = 6.0  # each of seven bands moves by at most this much
    bottom_hz: tuple[float, float] = (20.0, 350.0)  # corner of the high-pass
    top_hz: tuple[float, float] = (1_900.0, 8_000.0)  # corner of the low-pass
    reverb_chance: float = 0.25
    reverb_seconds: tuple[float, float] = (0.08, 0.5)  # time to fall by 60 dB
    peak_db: tuple[float, float] = (-26.0, -0.5)  # level of the loudest sample
    clipping_chance: float = 0.08
    noise_chance: float = 0.7
    noise_db: tuple[float, float] = (5.0, 45.0)  # signal over noise
    offset_chance: float = 0.2  # a constant (DC) of up to 2 % of the peak


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


def read_wave(data: bytes) -> tuple[np.ndarray, int]:
    """Return the mono wave in a sound file's bytes, and its rate in Hz."""
    try:
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    except soundfile.LibsndfileError as error:
        raise DataError(f"{len(data)} bytes are not a sound file ({error}); WAV works") from error
    return (wave if wave.ndim == 1 else wave.mean(axis=1)), int(rate)


def resample(wave: np.ndarray, rate: float, target: float) -> np.ndarray:
    """Return the wave at another rate, both in Hz."""
    return wave if rate == target else np.asarray(soxr.resample(wave, rate, target, quality="MQ"), dtype=np.float32)


def stretch(wave: np.ndarray, rate: int, factor: float) -> np.ndarray:
    """Return the wave made `factor` times longer at the same pitch (WSOLA).

    Frames of 30 ms overlap by half; each is read up to 7 ms from where it should be, where it continues the last best.
    """
    hop, reach, coarse = round(0.015 * rate), round(0.007 * rate), max(1, rate // 8000)
    length = round(len(wave) * factor)
    count = -(-length // hop)
    padded = np.pad(wave, (reach, 4 * hop + 2 * reach))
    starts = np.zeros(count, dtype=np.int64)
    starts[0] = reach
    for frame in range(1, count):
        ideal = min(int(frame * hop / factor), len(wave))
        target = padded[starts[frame - 1] + hop :][: 2 * hop : coarse]
        region = padded[ideal : ideal + 2 * (hop + reach) : coarse]
        starts[frame] = ideal + coarse * int(np.correlate(region, target[: len(region)], "valid").argmax())
    fade = np.sin(0.5 * np.pi * (np.arange(hop) + 0.5) / hop).astype(np.float32) ** 2
    frames = padded[starts[:, None] + np.arange(2 * hop)]
    out = frames[:, :hop] * np.where(np.arange(count)[:, None] > 0, fade, np.float32(1))
    out[1:] += frames[:-1, hop:] * fade[::-1]
    return np.asarray(out.reshape(-1)[:length], dtype=np.float32)


def shift_formants(wave: np.ndarray, rate: int, factor: float) -> np.ndarray:
    """Return the wave with its spectral envelope scaled along frequency; pitch and duration stay.

    The envelope is the log spectrum of 32 ms without its ripples finer than 1.8 ms of quefrency.
    """
    hop = 2 ** round(np.log2(0.016 * rate))
    size, bins = 2 * hop, hop + 1
    window = np.sin(np.pi * (np.arange(size) + 0.5) / size).astype(np.float32)
    padded = np.pad(wave, (hop, size + hop - len(wave) % hop))
    spectrum = fft.rfft(sliding_window_view(padded, size)[::hop] * window)
    cepstrum = fft.irfft(np.log(np.abs(spectrum) + 1e-5), axis=-1)
    kept = round(0.0018 * rate)
    cepstrum[:, kept:-kept] = 0.0
    envelope = fft.rfft(cepstrum).real
    source = np.minimum(np.arange(bins) / factor, bins - 1.001)
    below = source.astype(np.int64)
    share = (source - below).astype(np.float32)
    moved = envelope[:, below] * (1 - share) + envelope[:, below + 1] * share
    frames = fft.irfft(spectrum * np.exp(np.clip(moved - envelope, -4.0, 4.0)), axis=-1) * window
    out = frames[1:, :hop] + frames[:-1, hop:]
    return np.asarray(out.reshape(-1)[: len(wave)], dtype=np.float32)


def augment(wave: np.ndarray, rate: int, rng: Generator, variation: Variation | None = None) -> np.ndarray:
    """Return the words said by another voice, in another room, over another channel; the rate stays.

    The result is finite, in [-1, 1], and at most 1 / min(pitch, tempo) times longer plus the silences.
    """
    drawn = variation or Variation()
    wave = np.asarray(wave, dtype=np.float32)
    if rng.random() < drawn.voice_chance:
        wave = _revoice(wave, rate, rng, drawn)
    if rng.random() < drawn.silence_chance:
        before, after = rng.uniform(*drawn.silence, size=2) * rate
        wave = np.pad(wave, (int(before), int(after)))
    return _transmit(wave, rate, rng, drawn)


def _revoice(wave: np.ndarray, rate: int, rng: Generator, drawn: Variation) -> np.ndarray:
    pitch, formants, tempo = (
        float(np.exp(rng.uniform(*np.log(r)))) for r in (drawn.pitch, drawn.formants, drawn.tempo)
    )
    apart, timed = rng.random() < drawn.formants_chance, rng.random() < drawn.tempo_chance
    length = len(wave) / (tempo if timed else pitch)
    wave = resample(wave, rate * pitch, rate)
    if apart and abs(formants / pitch - 1) > 0.03:
        wave = shift_formants(wave, rate, formants / pitch)
    factor = length / max(1, len(wave))
    return stretch(wave, rate, factor) if timed and abs(factor - 1) > 0.03 else wave


def _transmit(wave: np.ndarray, rate: int, rng: Generator, drawn: Variation) -> np.ndarray:
    length, reverb = len(wave), rng.random() < drawn.reverb_chance
    tail = rng.uniform(*drawn.reverb_seconds) if reverb else 0.0
    size = -(-(length + round(tail * rate) + 1) // 1024) * 1024  # few sizes, all quick to transform
    octaves = _octaves(size, rate)
    spectrum = fft.rfft(wave, size)
    if rng.random() < drawn.channel_chance:
        gain_db = np.clip(octaves, -3.0, 3.0) * rng.uniform(*drawn.tilt_db)
        gain_db += np.interp(octaves, np.arange(-3, 4), rng.uniform(-1, 1, size=7) * drawn.equaliser_db)
        bottom, top = (np.log2(rng.uniform(*r) / 1000) for r in (drawn.bottom_hz, drawn.top_hz))
        steep = rng.choice((6.0, 12.0, 24.0, 48.0), size=2)  # dB per octave outside the band
        gain_db -= steep[0] * np.maximum(bottom - octaves, 0.0) + steep[1] * np.maximum(octaves - top, 0.0)
        spectrum *= 10 ** (np.clip(gain_db, -80.0, 40.0) / 20)
    if reverb:
        time = np.arange(1, round(tail * rate) + 1, dtype=np.float32) / np.float32(tail * rate)
        echo = rng.standard_normal(len(time), dtype=np.float32) * np.exp(-6.9 * time)
        echo *= rng.uniform(0.1, 0.9) / np.sqrt(np.square(echo).sum() + 1e-9)
        spectrum *= 1.0 + fft.rfft(echo, size)
    wave = fft.irfft(spectrum, size)[:length]
    wave *= 10 ** (rng.uniform(*drawn.peak_db) / 20) / (np.abs(wave).max(initial=0.0) + 1e-6)
    peak = float(np.abs(wave).max(initial=0.0))
    if rng.random() < drawn.clipping_chance:
        wave = np.clip(wave, *(np.array((-1, 1)) * peak * rng.uniform(0.2, 0.8)))
    if rng.random() < drawn.noise_chance:
        loud = wave[np.abs(wave) > 0.05 * peak]
        level = np.sqrt(np.square(loud).mean()) if len(loud) else 1e-3
        noise = _noise(size, octaves, np.abs(spectrum), rng)[:length]
        noise /= np.sqrt(np.square(noise).mean()) + 1e-9
        wave += noise * level * 10 ** (-rng.uniform(*drawn.noise_db) / 20)
    if rng.random() < drawn.offset_chance:
        wave += rng.uniform(-0.02, 0.02) * peak
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


def mask_bands(mel: np.ndarray, rng: Generator, bands: int = 2, widest: int = 12, longest: int = 6) -> np.ndarray:
    """Return log-mel features (frames, mels) with a few bands of channels and one stretch of frames at their mean.

    What is left must do: SpecAugment (Park et al., Interspeech 2019).
    """
    mel, mean = mel.copy(), mel.mean()
    for _ in range(bands):
        width = int(rng.integers(0, widest + 1))
        start = int(rng.integers(0, mel.shape[1] - width + 1))
        mel[:, start : start + width] = mean
    width = int(rng.integers(0, min(longest, len(mel) // 4) + 1))
    start = int(rng.integers(0, len(mel) - width + 1))
    mel[start : start + width] = mean
    return mel


@lru_cache(maxsize=256)
def _octaves(size: int, rate: int) -> np.ndarray:
    """Each bin's octaves above 1 kHz, (size // 2 + 1,); the constant counts as 20 Hz."""
    return np.log2(np.maximum(np.arange(size // 2 + 1) * (rate / size), 20.0) / 1000)


def _noise(size: int, octaves: np.ndarray, speech: np.ndarray, rng: Generator) -> np.ndarray:
    """Noise of one colour: blue, white, pink, brown, a mains hum, or the colour of the speech itself."""
    spectrum = fft.rfft(rng.standard_normal(size, dtype=np.float32))
    colour = rng.integers(8)
    if colour == 0:
        spectrum *= speech
    elif colour == 1:  # a hum has power at the multiples of 50 or 60 Hz
        hertz = 1000 * 2**octaves / rng.choice((50.0, 60.0))
        spectrum *= np.exp(-(((hertz - np.round(hertz)) / 0.04) ** 2)) / np.maximum(hertz, 1.0)
    else:
        spectrum *= 2 ** (octaves * rng.uniform(-1.1, 0.5))
    return np.asarray(fft.irfft(spectrum, size))


def digit_string(
    rows: Sequence[Clip],
    rng: Generator,
    low: int = 1,
    high: int = 7,
    augmented: bool = True,
    variation: Variation | None = None,
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
        wave = np.clip(resample(augment(wave, rate, rng, variation), rate, target), -1.0, 1.0)
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


def number_words(number: int) -> str:
    """Return a number from 0 to 99 in lower-case words, "sixty three"."""
    if not 0 <= number <= 99:
        raise DataError(f"number={number} must lie in 0..99, such as 63")
    if number < 20:
        return (DIGITS + TEENS)[number]
    ten, one = divmod(number, 10)
    return TENS[ten - 2] + (f" {DIGITS[one]}" if one else "")


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
