"""Pictures: goldens of the released preprocessing, formats, and every refusal."""

from __future__ import annotations

import functools
import io
import itertools
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modalora.contracts import image_tokens
from modalora.errors import ConfigError, MediaError
from modalora.processing.image import ImageConfig, count_image_tokens, grid, image_features, open_image, read_image

CONFIG = ImageConfig()
# the reference values are printed to five digits (pixels) and six (means): half a unit of the last one, plus rounding
PIXEL = {"abs": 6e-6}
MEAN = {"abs": 2e-6}


def ramp(width: int, height: int) -> Image.Image:
    """R = x, G = y, B = x + y, each modulo 256."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray((np.stack([x, y, x + y], axis=-1) % 256).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def half(kind: str) -> bytes:
    """Return the first half of a picture's bytes."""
    data = encode(ramp(300, 200), kind)
    return data[: len(data) // 2]


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that states a size and holds no pixels."""
    chunks = b""
    for tag, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


GOLDENS = {
    (640, 480): dict(
        grid=[2, 2],
        tokens=1065,
        valid=[1024, 1024, 1024, 512, 512],
        crop=[0.12157, -0.44314, 0.67843],
        whole=[-0.76471, 0.12157, 0.35686],
        means=[0.211489, -0.107064, -0.067068, 0.505013, 0.515075],
    ),
    (1000, 700): dict(
        grid=[2, 3],
        tokens=1777,
        valid=[1024, 1024, 1024, 896, 1024, 1024, 896],
        crop=[0.22353, -0.38824, 0.83529],
        whole=[0.67059, 0.22745, -0.10980],
        means=[0.017772, -0.120375, -0.038313, 0.120964, -0.038312],
    ),
    (300, 2000): dict(
        grid=[5, 1],
        tokens=1313,
        valid=[1024, 768, 768, 768, 768, 768],
        crop=[0.40392, -0.30196, -0.90588],
        whole=[0.40392, 0.50588, -0.09804],
        means=[0.213908, 0.176360, 0.242982, 0.202240, 0.222803],
    ),
}


@pytest.mark.parametrize("size", GOLDENS)
def test_features_equal_those_of_the_released_preprocessing(size: tuple[int, int]) -> None:
    golden = GOLDENS[size]
    features, tokens = image_features(ramp(*size), CONFIG)
    pixels, mask = features["pixels"], features["mask"]
    assert pixels.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert pixels.shape == (len(golden["valid"]), 3, 448, 448)
    assert mask.shape == (len(golden["valid"]), 32, 32)
    assert features["grid"].dtype == torch.int64
    assert features["grid"].tolist() == golden["grid"]
    assert tokens == golden["tokens"]
    assert mask.sum(dim=(1, 2)).tolist() == golden["valid"]
    assert pixels[1, :, 100, 200].tolist() == pytest.approx(golden["crop"], **PIXEL)
    assert pixels[0, :, 100, 200].tolist() == pytest.approx(golden["whole"], **PIXEL)
    means = pixels.mean(dim=(1, 2, 3)).tolist()
    assert means[: len(golden["means"])] == pytest.approx(golden["means"], **MEAN)


def test_bicubic_overshoot_of_the_global_view_is_kept() -> None:
    whole = image_features(ramp(640, 480), CONFIG)[0]["pixels"][0]
    assert [whole.min().item(), whole.max().item()] == pytest.approx([-1.234827, 1.189246], **MEAN)


@pytest.mark.parametrize(
    ("size", "cells", "tokens"),
    [
        ((448, 448), (1, 1), 545),
        ((28, 448), (1, 1), 305),
        ((449, 448), (2, 1), 561),
        ((640, 480), (2, 2), 1065),
        ((1000, 700), (3, 2), 1777),
        ((1344, 1344), (3, 3), 2625),
        ((1920, 1080), (5, 3), 3918),
        ((300, 2000), (1, 5), 1313),
        ((3000, 300), (7, 1), 1629),
        ((5000, 400), (12, 1), 3361),
        ((4032, 3024), (4, 3), 3393),
        ((8000, 6000), (4, 3), 3393),
        ((2688, 2688), (6, 6), 9585),
        ((4000, 4000), (6, 6), 9585),
    ],
)
def test_a_picture_fills_the_published_number_of_tokens(
    size: tuple[int, int], cells: tuple[int, int], tokens: int
) -> None:
    assert grid(*size, CONFIG) == cells
    assert image_features(Image.new("RGB", size), CONFIG)[1] == tokens


@functools.cache
def released_grids(most: int) -> list[tuple[int, int]]:
    """The candidates as released code has them: those of equal size come as a set of Python has them."""
    found = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= most}
    return sorted(found, key=lambda cells: cells[0] * cells[1])


def released_grid(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    most, best, chosen = config.max_crops, float("inf"), (1, 1)
    own = -(-width // config.crop), -(-height // config.crop)
    if own[0] * own[1] <= most:
        return own
    for one in released_grids(most):
        distance = abs(width / height - one[0] / one[1])
        if distance < best:
            best, chosen = distance, one
        elif distance == best and width * height > 0.5 * config.crop * config.crop * one[0] * one[1]:
            chosen = one
    return chosen


@pytest.mark.parametrize("most", [1, 2, 4, 6, 12, 16, 36, 64])
def test_pictures_equally_far_from_two_grids_get_the_released_one(most: int) -> None:
    """Whatever the order of grids of equal size, such as 2 x 3 and 3 x 2: see image._grids."""
    config = ImageConfig(crop=56, patch=14, max_crops=most)
    cells = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1)]
    cells.sort(key=lambda one: one[0] / one[1])
    pairs = list(itertools.pairwise(cells))  # nearest in shape
    pairs += [pair for pair in itertools.combinations(cells, 2) if len({i * j for i, j in pair}) == 1]
    for (one, high), (two, low) in pairs:
        for times in (1, 60):  # below and above half of the pixels of a grid
            size = times * (one * low + two * high), times * 2 * high * low
            assert grid(*size, config) == released_grid(*size, config), size


def test_the_largest_layout_of_36_crops_fills_10065_tokens() -> None:
    counts = [image_tokens(32 * h, 32 * w, 32) for w in range(1, 37) for h in range(1, 37) if w * h <= 36]
    assert max(counts) == 10_065


@pytest.mark.parametrize(("crop", "patch", "most"), [(112, 14, 4), (112, 8, 9), (56, 14, 1), (448, 14, 36)])
def test_every_layout_agrees_with_its_mask(crop: int, patch: int, most: int) -> None:
    config = ImageConfig(crop=crop, patch=patch, max_crops=most)
    random = np.random.default_rng(crop + patch + most)
    for width, height in random.integers(20, 4 * crop if crop < 448 else 900, size=(12, 2)).tolist():
        features, tokens = image_features(ramp(width, height), config)
        pixels, mask, (rows, columns) = features["pixels"], features["mask"], features["grid"].tolist()
        assert rows * columns <= most
        assert pixels.shape == (1 + rows * columns, 3, crop, crop)
        assert mask[0].all()
        # the released count: what is left of the mask at every second patch, its first column again, the global view
        whole = mask[1:].view(rows, columns, config.side, config.side).transpose(1, 2)
        seen = whole.reshape(rows * config.side, columns * config.side)[::2, ::2]
        pooled = config.side // 2
        assert tokens == pooled**2 + pooled + 1 + int(seen.sum()) + int(seen[:, 0].sum())
        # where the mask is false there is white
        fine = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        assert (pixels.permute(0, 2, 3, 1)[~fine] == 1).all()


def test_crops_tile_the_picture_row_by_row() -> None:
    picture = ramp(224, 336)
    features, _ = image_features(picture, ImageConfig(crop=112, max_crops=6))
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    for place, tile in enumerate(features["pixels"][1:]):
        top, left = 112 * (place // 2), 112 * (place % 2)
        # 1e-6: the division by 255 and by 0.5 against one by 127.5, float32
        torch.testing.assert_close(tile, expected[:, top : top + 112, left : left + 112], atol=1e-6, rtol=0)


def test_a_picture_of_extreme_shape_is_refused() -> None:
    with pytest.raises(MediaError, match=r"5000x8 pixels would be scaled to 5376x8.*at least 10; cut"):
        image_features(Image.new("RGB", (5000, 8)), CONFIG)


def test_features_want_rgb() -> None:
    with pytest.raises(MediaError, match="mode 'RGBA' must be RGB.*open_image"):
        image_features(Image.new("RGBA", (50, 50)), CONFIG)


# formats


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels_saved(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "picture"
    path.write_bytes(encode(ramp(60, 40), kind, **options))
    for source in (path, str(path), path.read_bytes()):
        opened = open_image(source, CONFIG)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(ramp(60, 40)))


def test_jpeg_is_close_to_the_picture_saved() -> None:
    smooth = Image.fromarray(np.repeat(np.linspace(0, 255, 64)[None, :, None], 64, 0).repeat(3, 2).astype(np.uint8))
    opened = open_image(encode(smooth, "JPEG", quality=95), CONFIG)
    # JPEG at quality 95 stays within a few levels on a smooth ramp
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(smooth)).max() <= 6


def test_exif_orientation_is_applied() -> None:
    picture = ramp(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    opened = open_image(encode(picture, "PNG", exif=exif), CONFIG)
    assert opened.size == (40, 60)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))


def test_alpha_is_laid_on_white() -> None:
    picture = Image.new("RGBA", (20, 20), (200, 0, 0, 0))
    picture.paste((200, 0, 0, 255), (0, 0, 10, 20))
    picture.putpixel((15, 15), (0, 0, 0, 128))
    opened = open_image(encode(picture, "PNG"), CONFIG)
    assert opened.getpixel((5, 5)) == (200, 0, 0)
    assert opened.getpixel((15, 5)) == (255, 255, 255)
    assert opened.getpixel((15, 15)) == (127, 127, 127)
    grey = Image.new("LA", (20, 20), (0, 0))
    assert open_image(encode(grey, "PNG"), CONFIG).getpixel((3, 3)) == (255, 255, 255)


def test_a_palette_keeps_its_colours_and_its_transparency() -> None:
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30, 50, 60, 70])
    picture.paste(2, (10, 0, 20, 20))
    assert open_image(encode(picture, "PNG"), CONFIG).getpixel((0, 0)) == (10, 200, 30)
    for transparency in (2, b"\xff\xff\x00"):
        opened = open_image(encode(picture, "PNG", transparency=transparency), CONFIG)
        assert opened.getpixel((0, 0)) == (10, 200, 30)
        assert opened.getpixel((15, 5)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for data in (encode(Image.fromarray(levels), "PNG"), encode(Image.fromarray(levels), "TIFF")):
        opened = np.asarray(open_image(data, CONFIG))
        np.testing.assert_array_equal(opened[..., 0].ravel(), np.arange(256))
        np.testing.assert_array_equal(opened[..., 0], opened[..., 2])
    integers = Image.fromarray(levels.astype(np.int32))
    assert integers.mode == "I"
    np.testing.assert_array_equal(np.asarray(open_image(integers, CONFIG))[..., 1].ravel(), np.arange(256))


def test_sixteen_bits_are_rounded_to_the_nearest_of_eight() -> None:
    levels = np.array([[128, 129, 385, 386, 65406, 65407]], dtype=np.uint16)
    opened = open_image(encode(Image.fromarray(levels.repeat(8, 0).repeat(2, 1)), "PNG"), CONFIG)
    assert np.asarray(opened)[0, ::2, 0].tolist() == [0, 1, 1, 2, 254, 255]


def test_the_transparent_level_of_sixteen_bits_becomes_white() -> None:
    levels = np.array([1000, 1001], dtype=np.uint16).repeat(64).reshape(8, 16)
    opened = open_image(encode(Image.fromarray(levels), "PNG", transparency=1000), CONFIG)
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((0, 7)) == (4, 4, 4)


def test_grey_levels_beyond_sixteen_bits_and_float_pixels_are_refused() -> None:
    with pytest.raises(MediaError, match="from 70000 to 70000, and they must lie in 0 to 65535"):
        open_image(Image.fromarray(np.full((9, 9), 70_000, dtype=np.int32)), CONFIG)
    with pytest.raises(MediaError, match="floating-point"):
        open_image(encode(Image.fromarray(np.zeros((9, 9), dtype=np.float32)), "TIFF"), CONFIG)


def test_one_bit_grey_and_cmyk_become_rgb() -> None:
    black_and_white = Image.new("1", (16, 16), 1)
    black_and_white.putpixel((3, 3), 0)
    opened = open_image(encode(black_and_white, "PNG"), CONFIG)
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((3, 3)) == (0, 0, 0)
    assert open_image(encode(Image.new("L", (16, 16), 77), "PNG"), CONFIG).getpixel((1, 1)) == (77, 77, 77)
    cyan = open_image(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"), CONFIG)
    assert cyan.getpixel((1, 1)) == (0, 255, 255)
    cyan = open_image(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"), CONFIG)
    assert cyan.getpixel((1, 1)) == pytest.approx((0, 255, 255), abs=2)  # JPEG loses a level or two


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data, CONFIG).getpixel((2, 2)) == (255, 0, 0)


def test_a_given_pillow_image_is_left_unchanged() -> None:
    picture = Image.new("RGBA", (16, 16), (1, 2, 3, 0))
    opened = open_image(picture, CONFIG)
    opened.putpixel((0, 0), (9, 9, 9))
    assert picture.mode == "RGBA"
    assert picture.getpixel((0, 0)) == (1, 2, 3, 0)
    rgb = Image.new("RGB", (16, 16), (1, 2, 3))
    open_image(rgb, CONFIG).putpixel((0, 0), (9, 9, 9))
    assert rgb.getpixel((0, 0)) == (1, 2, 3)


def photo(mode: str = "RGB", turn: int = 1) -> bytes:
    across = np.linspace(0, 255, 3000)
    levels = np.stack([np.add.outer(0.3 * across[:2000], 0.5 * across), np.tile(across, (2000, 1))], axis=2)
    picture = Image.fromarray(np.dstack([levels, levels[..., :1]]).clip(0, 255).astype(np.uint8))
    picture.paste((255, 0, 0), (400, 300, 900, 1200))
    exif = Image.Exif()
    exif[0x0112] = turn
    return encode(picture.convert(mode), "JPEG", quality=92, exif=exif)


# every way up, and one that does not exist; grey goes the same way as colours, CMYK through Pillow
@pytest.mark.parametrize(("mode", "turn"), [*(("RGB", turn) for turn in range(1, 10)), ("L", 6), ("CMYK", 6)])
def test_fast_preparation_of_a_large_photo_stays_near_the_exact_one(mode: str, turn: int) -> None:
    made = {}
    for fast in (False, True):
        made[fast], tokens = read_image(photo(mode, turn), ImageConfig(max_crops=4, fast=fast))
    assert torch.equal(made[True]["grid"], made[False]["grid"])
    assert torch.equal(made[True]["mask"], made[False]["mask"])
    off = (made[True]["pixels"] - made[False]["pixels"]).abs()
    assert 0 < float(off.mean()) < 0.01  # of a range of 2; edges differ more


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (3, 2), (4, 5), (6, 6), (1, 36)])
def test_fast_preparation_of_a_picture_of_whole_crops_is_the_exact_one(columns: int, rows: int) -> None:
    noise = np.random.default_rng(rows).integers(0, 256, (56 * rows, 56 * columns, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "PNG")
    exact, fast = (read_image(data, ImageConfig(crop=56, fast=fast))[0]["pixels"] for fast in (False, True))
    assert torch.equal(fast[1:], exact[1:])
    # the view of the whole is scaled before its bytes become numbers, not after: rounded elsewhere
    torch.testing.assert_close(fast[0], exact[0], rtol=0, atol=1e-6)


def test_fast_preparation_of_an_opened_photo_takes_what_became_of_it() -> None:
    data = encode(Image.new("RGB", (60, 40), "red"), "JPEG")
    painted, grey = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    painted.paste("blue", (0, 0, 60, 40))
    grey.draft("L", grey.size)  # Pillow is to decode it so
    config = ImageConfig(crop=56, fast=True)
    assert read_image(painted, config)[0]["pixels"][1, :, 0, 0].tolist() == [-1, -1, 1]
    red, green, blue = read_image(grey, config)[0]["pixels"][1, :, 0, 0].tolist()
    assert red == green == blue


def test_fast_preparation_refuses_and_accepts_what_the_exact_one_does() -> None:
    fast = ImageConfig(fast=True)
    with pytest.raises(MediaError, match="image bytes cannot be decoded .*damaged or cut short"):
        read_image(photo()[:-5000], fast)
    odd = photo()[:-2] + b"\0\0\0" + photo()[-2:]  # libjpeg warns of bytes before a marker, and Pillow reads on
    assert read_image(odd, fast)[1] == read_image(photo(), fast)[1]
    given = Image.open(io.BytesIO(photo()))
    given.draft("RGB", (750, 500))  # the size of a given picture is what the picture says, not its file
    assert read_image(given, fast)[1] == image_features(given, ImageConfig())[1]


# refusals


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "image bytes: empty"),
        (
            b"hello, this is text",
            r"image bytes is not an image Pillow can read \(first bytes b'hello, t'\); give a PNG",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encode(Image.new("RGB", (1, 1)), "PNG"), "1x1 pixels, and each side must have at least 8"),
        (png_header(20_000, 20_000), "400,000,000 pixels, and at most 50,000,000"),
        (png_header(9_000, 9_000), "9000x9000 pixels, and at most 50,000,000 in all are read"),
        (png_header(13_000, 8_000), "13000x8000 pixels, and at most 50,000,000"),
        (png_header(100, 100), "damaged or cut short"),
        (half("PNG"), "damaged or cut short"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "is not an image Pillow can read"),
        (b"RIFF\x24\0\0\0WEBPVP8 ", "damaged or cut short"),
        (half("JPEG"), "damaged or cut short"),
        (half("TIFF"), "damaged or cut short|not an image"),
        (half("WEBP"), "damaged or cut short|not an image"),
        (encode(ramp(300, 200), "PNG")[:20], "damaged or cut short|not an image"),
        ("nowhere/x.png", "'nowhere/x.png' does not exist"),
        ("https://example.com/x.png", "'https://example.com/x.png' is a URL"),
        ("data:image/png;base64," + "A" * 100_000, "is a URL"),
        (Path("https://example.com/x.png"), "'https:/example.com/x.png' is a URL"),
        ("x" * 5000, "cannot be reached"),
        ("a\0b", "cannot be reached"),
        (17, "given as int"),
        (np.zeros((9, 9, 3), dtype=np.float32), "given as a float32 array of shape"),
        (np.zeros((3, 9, 9), dtype=np.uint8), "given as a uint8 array of shape"),
        ({"bytes": None, "path": None}, "given as a mapping of"),
        (io.StringIO("text"), "gives str, no bytes; open it with mode 'rb'"),
        (None, "given as NoneType"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_no_usable_image_is_refused_in_one_message(source: object, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=message):
            open_image(source, CONFIG)  # type: ignore[arg-type]


def test_a_picture_that_was_closed_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    ramp(30, 20).save(path)
    with Image.open(path) as closed:
        pass
    with pytest.raises(MediaError, match="it was closed before it was read, or is damaged; give it open, or its path"):
        open_image(closed, CONFIG)
    with pytest.raises(MediaError, match="it was closed before it was read"):
        count_image_tokens(closed, CONFIG)


def test_premultiplied_grey_is_read_as_grey_with_transparency() -> None:
    grey = ramp(30, 20).convert("LA")
    assert open_image(grey.convert("La"), CONFIG).tobytes() == open_image(grey, CONFIG).tobytes()


def test_files_are_named_in_the_refusal(tmp_path: Path) -> None:
    broken, empty, large = tmp_path / "broken.png", tmp_path / "empty.png", tmp_path / "large.png"
    broken.write_bytes(b"not a picture")
    empty.write_bytes(b"")
    large.write_bytes(b"\0" * 2000)
    with pytest.raises(MediaError, match="broken.png' is not an image"):
        open_image(broken, CONFIG)
    with pytest.raises(MediaError, match="empty.png': empty"):
        open_image(str(empty), CONFIG)
    with pytest.raises(MediaError, match="is a directory"):
        open_image(tmp_path, CONFIG)
    with pytest.raises(MediaError, match="large.png': 2,000 bytes, and at most 1,000 are read"):
        open_image(large, ImageConfig(max_bytes=1000))
    with pytest.raises(MediaError, match="image bytes: 2,000 bytes"):
        open_image(large.read_bytes(), ImageConfig(max_bytes=1000))


def test_no_corrupted_file_escapes_as_another_error() -> None:
    random = np.random.default_rng(7)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        whole = bytearray(encode(ramp(40, 30), kind))
        for _ in range(20):
            data = whole.copy()
            for place in random.integers(0, min(len(data), 200), size=6):
                data[place] = random.integers(256)
            try:
                assert open_image(bytes(data[: random.integers(1, len(data) + 1)]), CONFIG).mode == "RGB"
            except MediaError:
                continue


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(crop=100), r"crop=100 must be a positive multiple of 2 \* patch = 28.*; 112 works"),
        (dict(crop=0), "crop=0 must be a positive multiple.*; 28 works"),
        (dict(patch=0), "patch=0 must be at least 1; 14 works"),
        (dict(max_crops=0), "max_crops=0 must be at least 1; 36 works"),
        (dict(max_bytes=-1), "max_bytes=-1 must be at least 1"),
    ],
)
def test_a_config_out_of_range_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageConfig(**settings)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_zero_is_no_negative(bits: int) -> None:
    level = (2**bits - 1) // 4
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60), level, dtype=f"uint{bits}")).save(file, "TIFF")
    data = bytearray(file.getvalue())
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    (entry,) = [at + 2 + 12 * place for place in range(count) if data[at + 2 + 12 * place :][:2] == b"\x06\x01"]
    for white, expected in ((1, 255 // 4), (0, 255 - 255 // 4)):
        struct.pack_into("<H", data, entry + 8, white)
        shown = np.asarray(open_image(bytes(data), ImageConfig()))
        assert abs(int(shown[0, 0, 0]) - expected) <= 1
