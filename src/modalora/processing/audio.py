"""Sound into log-mel frames (Phi-4-Multimodal, arXiv:2503.01743, section 2.2.2: 80 mel filters, one frame each 10 ms).

A waveform is one channel of float32, nominally in [-1, 1]; rates are Hz. Frames are cut at 16 kHz or 8 kHz: other
rates are resampled first, up to 8 kHz or to 16 kHz. (The released processor divides the rate by a whole number instead,
and so reads 44.1 kHz at the wrong speed.) No centring, padding, dither or normalisation: silence becomes exactly 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from modalora.contracts import subsampled
from modalora.errors import ConfigError, MediaError
from modalora.processing.source import read_source, unwrapped

Wave = NDArray[np.float32]

WIDE, NARROW = 16_000, 8_000  # Hz: the two rates that frames are cut at
SLOWEST, FASTEST = 4_000, 384_000  # Hz
WINDOW_MS, HOP_MS = 25, 10
TOP_HZ = 7690.0  # upper edge of the last mel filter
EMPHASIS = 0.97
LOUDEST = 10.0  # float samples above this were never divided by their integer range
MOST_MELS = 112  # the narrowest filters still reach a bin of the Fourier transform
_GIVEN = "the given audio"  # what messages call an array
_UNTOLD = 1 << 48  # samples: a header that says more does not know the length, as of what was written to a pipe
_FIRST, _LAST = 2, 4  # flags of an Ogg page that begins or ends a stream
BLOCK = 256  # frames transformed at a time: they stay in a core's cache


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """How sound is turned into features, and which sound is refused."""

    mels: int = 80  # filters; the speech encoder of Phi-4-Multimodal takes 80
    max_seconds: float = 1800.0
    max_bytes: int = 400_000_000

    def __post_init__(self) -> None:
        """Check every rule."""
        if not 1 <= self.mels <= MOST_MELS:
            raise ConfigError(
                f"mels={self.mels} must lie in 1 to {MOST_MELS}, or some filter holds no frequency; 80 works"
            )
        if not self.max_seconds * 1000 >= WINDOW_MS:
            raise ConfigError(f"max_seconds={self.max_seconds} must be at least one window, 0.025; 1800 works")
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes={self.max_bytes} must be at least 1; 400000000 works")


def open_audio(source: str | Path | bytes | tuple[ArrayLike, int], config: AudioConfig) -> tuple[Wave, int]:
    """Return one channel of float32 (samples,) and its rate in Hz, as the source has it.

    source: a path, the bytes of a file (WAV, FLAC, OGG, MP3), or (array, rate) with the array (samples,) or
    (samples, channels); or what `unwrapped` makes one of. Channels are averaged. Integers of up to 32 bits are divided
    by their range; floats are taken as they are, unclipped where a decoder passes 1 a little. The length is checked in
    the header before decoding.
    Raises MediaError when the source is missing, not sound, damaged, cut short, too long, shorter than one window of
    25 ms, or holds numbers that are not finite.
    """
    source = unwrapped(source, "audio")
    if isinstance(source, tuple):
        return _checked(_GIVEN, *_from_array(_GIVEN, source, config))
    name, data = read_source(source, "audio", config.max_bytes)
    with _sound_file(name, data) as file:
        return _checked(name, *_decode(name, data, file, config))


def _checked(name: str, wave: Wave, rate: int) -> tuple[Wave, int]:
    """Return the wave and its rate, where it is long enough and its numbers are those of a sound."""
    if not wave.size:
        raise MediaError(f"{name} holds no samples (0 seconds); give at least {WINDOW_MS} ms of sound")
    if wave.size * 1000 < WINDOW_MS * rate:
        raise MediaError(
            f"{name} lasts {1000 * wave.size / rate:.1f} ms ({wave.size} samples at {rate} Hz), and one window needs "
            f"{WINDOW_MS} ms; give a longer sound"
        )
    peak = max(float(wave.max()), -float(wave.min()))  # NaN in, NaN out
    if not np.isfinite(peak):
        raise MediaError(f"{name} holds samples that are NaN or infinite, and all must be finite; repair the recording")
    if peak > LOUDEST:
        raise MediaError(
            f"{name} has float samples up to {peak:g}, and they must lie in [-1, 1]; divide by the range of the "
            "integers that they came from (32768 for 16 bit)"
        )
    return wave, rate


def read_audio(
    source: str | Path | bytes | tuple[ArrayLike, int], config: AudioConfig
) -> tuple[dict[str, Tensor], int]:
    """Return a sound's features and its tokens. Raises MediaError."""
    wave, rate = open_audio(source, config)
    mel = log_mel(wave, rate, mels=config.mels)
    return {"mel": mel}, subsampled(len(mel))


def count_audio_tokens(source: str | Path | bytes | tuple[ArrayLike, int], config: AudioConfig) -> int:
    """Return the tokens that a sound fills, from its header where that is exact (WAV, FLAC), else by decoding.

    Raises MediaError as open_audio does for what the header tells.
    """
    source = unwrapped(source, "audio")
    if isinstance(source, tuple):
        name = _GIVEN
        wave, rate = open_audio(source, config)
        samples = len(wave)
    else:
        name, data = read_source(source, "audio", config.max_bytes)
        with _sound_file(name, data) as file:
            samples, rate = int(file.frames), int(file.samplerate)
            _check_told(name, samples)
            if file.format in ("WAV", "FLAC") and not _missing_bytes(data):
                _check_rate(name, rate)
                _check_seconds(name, samples, rate, config)
            else:
                wave, rate = _checked(name, *_decode(name, data, file, config))
                samples = len(wave)
    target = _cut_at(rate)
    if target != rate:
        samples = int(samples * target / rate + 0.5)  # what soxr gives
    length, hop = _frame(target)
    if samples < length:
        raise MediaError(
            f"{name} lasts {1000 * samples / target:.1f} ms, and one window needs {WINDOW_MS} ms; give more"
        )
    return subsampled((samples - length) // hop + 1)


def _check_told(name: str, samples: int) -> None:
    if samples >= _UNTOLD:
        raise MediaError(f"{name} does not state its length, as one written to a pipe; write it to a file, or as WAV")


def _check_rate(name: str, rate: int) -> None:
    if not SLOWEST <= rate <= FASTEST:
        raise MediaError(
            f"{name} has a sample rate of {rate} Hz, and it must lie in {SLOWEST} to {FASTEST}; resample it to {WIDE}"
        )


def _check_seconds(name: str, samples: int, rate: int, config: AudioConfig) -> None:
    if samples > config.max_seconds * rate:
        raise MediaError(
            f"{name} lasts {samples / rate:,.1f} s, and at most {config.max_seconds:g} s are read; "
            "cut it into parts or raise max_seconds"
        )


def _from_array(name: str, source: tuple[Any, ...], config: AudioConfig) -> tuple[Wave, int]:
    number = int | float | np.integer | np.floating
    if len(source) != 2 or isinstance(source[1], bool) or not isinstance(source[1], number):
        given = ", ".join(type(part).__name__ for part in source)
        raise MediaError(f"{name} is a tuple of ({given}), and it must be (array, rate), such as (samples, 16000)")
    try:
        rate = int(source[1])
    except (OverflowError, ValueError):  # infinite, NaN
        rate = -1
    if rate != source[1]:
        raise MediaError(f"{name} has a sample rate of {source[1]}, and it must be a whole number of Hz, such as 16000")
    try:
        samples = np.asarray(source[0])
    except (TypeError, ValueError, RuntimeError) as error:
        raise MediaError(f"{name} does not become a numpy array ({error}); give (samples,) of float32") from error
    _check_rate(name, rate)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] > samples.shape[0] > 0):
        raise MediaError(
            f"{name} has the shape {samples.shape}, and it must be (samples,) or (samples, channels); transpose it"
        )
    _check_seconds(name, len(samples), rate, config)
    kind = samples.dtype
    if kind.kind in "iu" and kind.itemsize <= 4:
        half = 2.0 ** (8 * kind.itemsize - 1)
        samples = (samples.astype(np.float64) - (half if kind.kind == "u" else 0.0)) / half
    elif kind.kind != "f":
        raise MediaError(f"{name} has {kind} samples, which have no agreed range; give float in [-1, 1] or int16")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused as infinite
        mono = samples if samples.ndim == 1 else samples.mean(axis=1) if samples.size else samples[:0].reshape(-1)
        return np.ascontiguousarray(mono, dtype=np.float32), rate


@dataclass(slots=True)
class _Tape:
    """Bytes as a file whose ends stop every seek: damaged headers send a decoder beyond them."""

    data: bytes
    place: int = 0

    def seek(self, offset: int, whence: int) -> int:
        start = (0, self.place, len(self.data))[whence]
        self.place = min(max(0, start + offset), len(self.data))
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, count: int) -> bytes:
        part = self.data[self.place : self.place + count]
        self.place += len(part)
        return part


def _sound_file(name: str, data: bytes) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(_Tape(data))
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        known = data[:4] in (b"fLaC", b"OggS") or data[:4] + data[8:12] == b"RIFFWAVE"
        what = "starts like a sound file but is damaged or cut short" if known else "is not a sound file"
        raise MediaError(
            f"{name} {what} (first bytes {data[:12]!r}); give a whole WAV, FLAC, OGG or MP3 file"
        ) from error


def _decode(name: str, data: bytes, file: soundfile.SoundFile, config: AudioConfig) -> tuple[Wave, int]:
    """Return one channel of a file that was opened from these bytes, and its rate."""
    rate, promised = int(file.samplerate), int(file.frames)
    _check_told(name, promised)
    counted = file.format not in ("MP3", "MPEG") or _has_frame_count(data)
    _check_rate(name, rate)
    if counted:
        _check_seconds(name, promised, rate, config)
    blocks, held = [np.zeros(0, dtype=np.float32)], 0
    try:
        while len(block := file.read(10 * rate, dtype="float32", always_2d=True)):
            held += len(block)
            _check_seconds(name, held, rate, config)
            blocks.append(block.mean(axis=1))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise MediaError(f"{name} cannot be decoded ({error}), it is damaged or cut short; export it again") from error
    if _ogg_streams(data) > 1:
        raise MediaError(f"{name} holds several recordings one after the other, of which one is read; split it")
    missing = _missing_bytes(data)
    if missing or (counted and held < promised):
        lack = f"{missing} bytes" if missing else f"{promised - held} of {promised} samples"
        raise MediaError(f"{name} is cut short: {lack} that its header promises are missing; copy or export it again")
    return np.concatenate(blocks), rate


def _has_frame_count(data: bytes) -> bool:
    """Return whether an MP3 states its length; without the tag decoders only guess it from the first bit rate."""
    start = 0
    if data[:3] == b"ID3" and len(data) > 10:  # size of the metadata in front, seven bits a byte
        start = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    head = data[start : start + 4096]
    return b"Xing" in head or b"Info" in head


def _missing_bytes(data: bytes) -> int:
    """Return the bytes that a header, or a last Ogg page, promises beyond the end; decoders take what is there."""
    if data[:4] == b"RIFF":
        place = 12
        while place + 8 <= len(data):
            size = struct.unpack_from("<I", data, place + 4)[0]
            if data[place : place + 4] == b"data":
                endless = size >= 0x7FFFF000  # written by programs that stream and do not know the length
                return 0 if endless else max(0, place + 8 + size - len(data))
            place += 8 + size + size % 2
    elif data[:4] == b"RF64" and data[12:16] == b"ds64":
        return max(0, 8 + int.from_bytes(data[20:28], "little") - len(data))
    elif data[:4] == b"riff":  # Sony's W64
        return max(0, int.from_bytes(data[16:24], "little") - len(data))
    elif data[:4] == b"FORM":  # AIFF
        return max(0, 8 + int.from_bytes(data[4:8], "big") - len(data))
    elif data[:4] == b".snd" and data[8:12] != b"\xff" * 4:  # AU
        return max(0, int.from_bytes(data[4:8], "big") + int.from_bytes(data[8:12], "big") - len(data))
    elif data[:4] == b"OggS":
        page = data[data.rfind(b"OggS") :]
        end = 27 if len(page) < 27 else 27 + page[26] + sum(page[27 : 27 + page[26]])
        whole = len(page) >= end and page[5] & _LAST
        return 0 if whole else max(1, end - len(page))
    return 0


def _ogg_streams(data: bytes) -> int:
    """Return how many recordings an Ogg file holds one after the other; 0 for another file."""
    found, at, began = 0, 0, False
    while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
        begins = bool(data[at + 5] & _FIRST)
        found += begins and not began
        began = begins
        sizes = data[at + 27 : at + 27 + data[at + 26]]
        at += 27 + len(sizes) + sum(sizes)
    return found


@cache
def mel_matrix(mels: int = 80) -> Wave:
    """Return the filters (257 bins, mels), read-only: triangles in mel space with peak 1, from 0 to 7690 Hz at 16 kHz.

    Bins are those of a Fourier transform of 512; only 1 to 245 are used.
    """
    hertz = np.arange(257) * WIDE / 512
    bins = 1127.0 * np.log(1.0 + hertz / 700.0)
    top = 1127.0 * np.log(1.0 + TOP_HZ / 700.0)
    spacing = top / (mels + 1)
    centres = np.linspace(0.0, top, mels + 2)[1:-1]
    weights = np.maximum(0.0, 1.0 - np.abs(centres - bins[:, None]) / spacing)
    weights[0] = weights[int(TOP_HZ * 512 / WIDE + 0.5) :] = 0.0
    matrix: Wave = weights.astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def log_mel(wave: Wave, rate: int, *, mels: int = 80) -> Tensor:
    """Return the natural logarithm of mel power, float32 (frames, mels), one frame each 10 ms.

    wave: (samples,) in [-1, 1]. At 16 kHz a frame holds 400 samples and the next begins 160 later; what does not fill a
    frame at the end is dropped. At 8 kHz the upper half of the spectrum is zero, so filters 62 to 79 of 80
    are exactly 0. Other rates are resampled, those below 8 kHz to 8 kHz, the rest to 16 kHz. Silence is exactly 0.
    Raises MediaError when the wave has the wrong shape or no frame, or the rate is out of range.
    Source: arXiv:2503.01743, section 2.2.2; the released feature extractor for what the paper leaves open.
    """
    _check_rate("a wave", rate)
    if wave.ndim != 1:
        raise MediaError(f"a wave has the shape {wave.shape}, and it must be (samples,); average its channels first")
    wave = np.asarray(wave, dtype=np.float32)
    if (target := _cut_at(rate)) != rate:
        wave, rate = np.asarray(soxr.resample(wave, rate, target), dtype=np.float32), target
    length, hop = _frame(rate)
    if len(wave) < length:
        raise MediaError(f"a wave of {len(wave)} samples at {rate} Hz has no frame: it needs {length}, {WINDOW_MS} ms")
    bank = mel_matrix(mels)
    bank = bank if rate == WIDE else bank[:128]  # the bins of 8 kHz below its top one: the others are zero
    size = 512 if rate == WIDE else 256
    # samples as 16-bit numbers; a power of two rounds nothing
    window = torch.from_numpy(32768 * np.hamming(length))
    emphasised = wave.copy()
    emphasised[1:] -= np.float32(EMPHASIS) * wave[:-1]
    cuts = torch.from_numpy(emphasised).unfold(0, length, hop)
    heads = wave[: len(cuts) * hop : hop]  # each frame starts afresh: its first sample is its own predecessor
    firsts = torch.from_numpy(heads - np.float32(EMPHASIS) * heads)
    result = np.empty((len(cuts), mels), dtype=np.float32)
    # buffers are made once: the system clears large ones anew each time they are asked for
    most = min(BLOCK, len(cuts))
    windowed = torch.zeros(most, size, dtype=torch.float64)
    exact = torch.empty(most, size // 2 + 1, dtype=torch.complex128)
    spectrum = np.empty((most, len(bank)), dtype=np.complex64)
    power = np.empty((most, len(bank)), dtype=np.float32)
    for start in range(0, len(cuts), BLOCK):
        frames = cuts[start : start + BLOCK]
        own = slice(0, len(frames))
        windowed[own, :length] = frames
        windowed[own, 0] = firsts[start : start + BLOCK]
        windowed[own, :length] *= window
        torch.fft.rfft(windowed[own], out=exact[own])  # MKL's, as the window: half of numpy's time
        spectrum[own] = exact[own, : len(bank)].numpy()
        np.abs(spectrum[own], out=power[own])
        np.square(power[own], out=power[own])
        part = result[start : start + BLOCK]
        np.matmul(power[own], bank, out=part)
        np.log(np.maximum(part, np.float32(1.0), out=part), out=part)
    return torch.from_numpy(result)


def _cut_at(rate: int) -> int:
    """Return the rate at which the frames of a sound of this rate are cut."""
    return WIDE if rate > NARROW else NARROW


def _frame(rate: int) -> tuple[int, int]:
    """Return the samples of a frame, and from its first to that of the next."""
    return rate * WINDOW_MS // 1000, rate * HOP_MS // 1000
