"""Tokens counted from headers alone are those that the features have."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from modalora.contracts import subsampled
from modalora.errors import MediaError
from modalora.processing.audio import AudioConfig, count_audio_tokens, log_mel, open_audio, read_audio
from modalora.processing.image import ImageConfig, count_image_tokens, image_features, open_image

SMALL, LARGE = ImageConfig(crop=56, patch=14, max_crops=6), ImageConfig()
FAST = ImageConfig(crop=56, patch=14, max_crops=6, fast=True)


def outcome(count: Any) -> Any:
    """What a count is, or that it is refused."""
    try:
        return count()
    except MediaError:
        return MediaError


@settings(max_examples=80, deadline=None)
@given(
    st.integers(5, 300),
    st.integers(5, 300),
    st.sampled_from(("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")),
    st.integers(1, 8),
    st.sampled_from((SMALL, LARGE, FAST)),
)
def test_a_picture_has_the_tokens_that_its_header_tells(
    width: int, height: int, kind: str, orientation: int, config: ImageConfig
) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = orientation
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    Image.new("RGB", (width, height), "red").save(file, kind, **options)
    data = file.getvalue()
    features = outcome(lambda: image_features(open_image(data, config), config)[1])
    assert outcome(lambda: count_image_tokens(data, config)) == features


def test_a_png_that_is_turned_in_a_raw_profile_is_counted_as_it_is_read() -> None:
    exif = Image.Exif()
    exif[274] = 6
    told = PngImagePlugin.PngInfo()
    told.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n")
    tokens = []
    for options in ({}, {"pnginfo": told}):
        file = io.BytesIO()
        Image.new("RGB", (300, 60), "red").save(file, "PNG", **options)
        tokens.append(image_features(open_image(file.getvalue(), SMALL), SMALL)[1])
        assert count_image_tokens(file.getvalue(), SMALL) == tokens[-1]
    assert tokens[0] != tokens[1]


def test_a_png_is_counted_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (200, 100), "red").save(file, "PNG")

    def refuse(self: Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    assert count_image_tokens(file.getvalue(), SMALL) > 0


RATES = (4_000, 6_000, 8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 60_000), st.sampled_from(RATES), st.sampled_from(("WAV", "FLAC", "OGG", "array")))
def test_a_sound_has_the_frames_that_its_header_tells(samples: int, rate: int, kind: str) -> None:
    wave = np.zeros(samples, dtype=np.float32)
    source: Any = (wave, rate)
    if kind != "array":
        file = io.BytesIO()
        soundfile.write(file, wave, rate, format=kind)
        source = file.getvalue()
    config = AudioConfig()
    tokens = outcome(lambda: subsampled(len(log_mel(*open_audio(source, config)))))
    assert outcome(lambda: count_audio_tokens(source, config)) == tokens


def test_a_resampled_sound_is_counted_by_the_nearest_sample() -> None:
    file = io.BytesIO()
    # 1679.8 samples at 16 kHz: with 1680 there are nine frames, which are two tokens
    soundfile.write(file, np.zeros(4_630), 44_100, format="WAV")
    assert read_audio(file.getvalue(), AudioConfig())[1] == 2
    assert count_audio_tokens(file.getvalue(), AudioConfig()) == 2


def test_a_sound_beyond_the_limit_is_refused_from_its_header() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16_000), 16_000, format="WAV")
    with pytest.raises(MediaError, match="lasts 1.0 s, and at most 0.5 s are read"):
        count_audio_tokens(file.getvalue(), AudioConfig(max_seconds=0.5))


def test_what_is_missing_or_cut_short_is_refused_from_the_header(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="does not exist"):
        count_image_tokens(tmp_path / "gone.png", SMALL)
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000), 8000, format="WAV", subtype="PCM_16")
    with pytest.raises(MediaError, match="cut short"):
        count_audio_tokens(file.getvalue()[:9000], AudioConfig())


@pytest.mark.parametrize("kind", ["WAV", "OGG"])
def test_a_sound_that_cannot_be_counted_is_named_and_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / f"cut.{kind.lower()}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 32_000), 16_000, format=kind)
    path.write_bytes(path.read_bytes()[:-300])
    opened = []
    whole = soundfile.SoundFile
    monkeypatch.setattr(soundfile, "SoundFile", lambda *given: opened.append(given) or whole(*given))
    with pytest.raises(MediaError) as counted:
        count_audio_tokens(path, AudioConfig())
    assert len(opened) == 1
    with pytest.raises(MediaError, match=f"^'{path}' is cut short: ") as read:
        open_audio(path, AudioConfig())
    assert str(counted.value) == str(read.value)
