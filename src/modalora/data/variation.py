"""Variations of a recording that stand in for unseen speakers, rooms and channels.

Waves are mono float32 in [-1, 1], (samples,); rates are samples per second (Hz), levels dB, durations seconds.
A speaker nobody recorded differs mostly in the length of the vocal tract, which scales the formants, then in pitch
and tempo. `augment` draws the three apart: resampling scales pitch and formants together (vocal tract length
perturbation in the time domain), a warp of the cepstral envelope moves the formants alone, and WSOLA (Verhelst and
Roelands, ICASSP 1993) sets the duration. What a channel does to the sound is one product in the frequency domain.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import soxr
from numpy import fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.random import Generator

# How far `augment` may go: a (low, high) range is drawn from evenly, a chance is the share of clips changed.
VOICE_CHANCE = 0.85  # clips whose pitch and formants change
PITCH = (0.75, 1.35)  # factor of pitch, drawn in the logarithm
FORMANTS = (0.82, 1.25)  # factor of the formants where they move apart from the pitch
FORMANTS_CHANCE = 0.5  # else the formants go with the pitch, as plain resampling does
TEMPO = (0.75, 1.35)  # factor of the speed where it is drawn apart from the pitch
TEMPO_CHANCE = 0.6  # else a higher pitch is faster, as plain resampling does
SILENCE = (0.0, 0.3)  # seconds before, and again after
SILENCE_CHANCE = 0.6
CHANNEL_CHANCE = 0.7  # clips with tilt, equaliser and band limits
TILT_DB = (-4.0, 4.0)  # dB per octave around 1 kHz, at most 3 octaves of it
EQUALISER_DB = 6.0  # each of seven bands moves by at most this much
BOTTOM_HZ = (20.0, 350.0)  # corner of the high-pass
TOP_HZ = (1_900.0, 8_000.0)  # corner of the low-pass
REVERB_CHANCE = 0.25
REVERB_SECONDS = (0.08, 0.5)  # time to fall by 60 dB
PEAK_DB = (-26.0, -0.5)  # level of the loudest sample
CLIPPING_CHANCE = 0.08
NOISE_CHANCE = 0.7
NOISE_DB = (5.0, 45.0)  # signal over noise
OFFSET_CHANCE = 0.2  # a constant (DC) of up to 2 % of the peak


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


def augment(wave: np.ndarray, rate: int, rng: Generator) -> np.ndarray:
    """Return the words said by another voice, in another room, over another channel; the rate stays.

    The result is finite, in [-1, 1], and at most 1 / min(pitch, tempo) times longer plus the silences.
    """
    wave = np.asarray(wave, dtype=np.float32)
    if rng.random() < VOICE_CHANCE:
        wave = _revoice(wave, rate, rng)
    if rng.random() < SILENCE_CHANCE:
        before, after = rng.uniform(*SILENCE, size=2) * rate
        wave = np.pad(wave, (int(before), int(after)))
    return _transmit(wave, rate, rng)


def _revoice(wave: np.ndarray, rate: int, rng: Generator) -> np.ndarray:
    pitch, formants, tempo = (float(np.exp(rng.uniform(*np.log(r)))) for r in (PITCH, FORMANTS, TEMPO))
    apart, timed = rng.random() < FORMANTS_CHANCE, rng.random() < TEMPO_CHANCE
    length = len(wave) / (tempo if timed else pitch)
    wave = resample(wave, rate * pitch, rate)
    if apart and abs(formants / pitch - 1) > 0.03:
        wave = shift_formants(wave, rate, formants / pitch)
    factor = length / max(1, len(wave))
    return stretch(wave, rate, factor) if timed and abs(factor - 1) > 0.03 else wave


def _transmit(wave: np.ndarray, rate: int, rng: Generator) -> np.ndarray:
    length, reverb = len(wave), rng.random() < REVERB_CHANCE
    tail = rng.uniform(*REVERB_SECONDS) if reverb else 0.0
    size = -(-(length + round(tail * rate) + 1) // 1024) * 1024  # few sizes, all quick to transform
    octaves = _octaves(size, rate)
    spectrum = fft.rfft(wave, size)
    if rng.random() < CHANNEL_CHANCE:
        gain_db = np.clip(octaves, -3.0, 3.0) * rng.uniform(*TILT_DB)
        gain_db += np.interp(octaves, np.arange(-3, 4), rng.uniform(-1, 1, size=7) * EQUALISER_DB)
        bottom, top = (np.log2(rng.uniform(*r) / 1000) for r in (BOTTOM_HZ, TOP_HZ))
        steep = rng.choice((6.0, 12.0, 24.0, 48.0), size=2)  # dB per octave outside the band
        gain_db -= steep[0] * np.maximum(bottom - octaves, 0.0) + steep[1] * np.maximum(octaves - top, 0.0)
        spectrum *= 10 ** (np.clip(gain_db, -80.0, 40.0) / 20)
    if reverb:
        time = np.arange(1, round(tail * rate) + 1, dtype=np.float32) / np.float32(tail * rate)
        echo = rng.standard_normal(len(time), dtype=np.float32) * np.exp(-6.9 * time)
        echo *= rng.uniform(0.1, 0.9) / np.sqrt(np.square(echo).sum() + 1e-9)
        spectrum *= 1.0 + fft.rfft(echo, size)
    wave = fft.irfft(spectrum, size)[:length]
    wave *= 10 ** (rng.uniform(*PEAK_DB) / 20) / (np.abs(wave).max(initial=0.0) + 1e-6)
    peak = float(np.abs(wave).max(initial=0.0))
    if rng.random() < CLIPPING_CHANCE:
        wave = np.clip(wave, *(np.array((-1, 1)) * peak * rng.uniform(0.2, 0.8)))
    if rng.random() < NOISE_CHANCE:
        loud = wave[np.abs(wave) > 0.05 * peak]
        level = np.sqrt(np.square(loud).mean()) if len(loud) else 1e-3
        noise = _noise(size, octaves, np.abs(spectrum), rng)[:length]
        noise /= np.sqrt(np.square(noise).mean()) + 1e-9
        wave += noise * level * 10 ** (-rng.uniform(*NOISE_DB) / 20)
    if rng.random() < OFFSET_CHANCE:
        wave += rng.uniform(-0.02, 0.02) * peak
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


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
