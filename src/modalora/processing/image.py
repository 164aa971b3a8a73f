"""Pictures into crops, a patch mask and a token count (Phi-4-Multimodal, arXiv:2503.01743, section 2.2.1).

A picture is scaled onto a grid of square crops, padded with white on the right and below, and cut; one further view
shows the whole grid in a single square. Sizes are pixels, (width, height) as Pillow has them; tensors are (crops, 3,
height, width) in [-1, 1], and the global view comes first. Its bicubic values pass 1 a little and are kept so, as in
the released model.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from simplejpeg import decode_jpeg
from torch import Tensor
from torch.nn import functional

from modalora.contracts import image_tokens
from modalora.errors import ConfigError, MediaError
from modalora.processing.source import read_source, unwrapped

# Formats read: each is decoded inside Pillow, none starts another program (EPS would).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_WHITE_IS_ZERO = 262  # tag of a TIFF: 0 where white is 0
_GIVEN = "the given image"
_CLOSED = "it was closed before it was read, or is damaged; give it open, or its path"
THINNEST = 10  # pixels: a picture whose short side would be scaled below this is refused


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """How pictures are cut, and which are refused unread. The defaults are those of Phi-4-Multimodal."""

    crop: int = 448  # pixels along one crop
    patch: int = 14  # pixels along one patch of the vision encoder
    max_crops: int = 36  # crops of the grid, the global view not counted [M]
    min_side: int = 8  # pixels
    max_pixels: int = 50_000_000
    max_bytes: int = 50_000_000
    # Under half the time for a large photo: JPEGs are decoded at a lower scale where the crops need no more, and all
    # pictures are resized by other implementations. Pixels are under 1 % of the range off on average; else they are the
    # released processor's.
    fast: bool = False

    def __post_init__(self) -> None:
        """Check every rule."""
        for name in ("patch", "max_crops", "min_side", "max_pixels", "max_bytes"):
            if getattr(self, name) < 1:
                default = ImageConfig.__dataclass_fields__[name].default
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1; {default} works")
        if self.crop < 1 or self.crop % (2 * self.patch):
            works = max(1, round(self.crop / (2 * self.patch))) * 2 * self.patch
            raise ConfigError(
                f"crop={self.crop} must be a positive multiple of 2 * patch = {2 * self.patch}, because patches are "
                f"averaged two by two; {works} works"
            )

    @property
    def side(self) -> int:
        """Patches along one crop."""
        return self.crop // self.patch


def read_image(source: str | Path | bytes | Image.Image, config: ImageConfig) -> tuple[dict[str, Tensor], int]:
    """Return a picture's features and its tokens, as image_features does. Raises MediaError."""
    with _unwarned():
        name, image = _open_unread(source, config)
        if config.fast and image is not source and (levels := _decode_small(image, config)) is not None:
            return _features(levels, _layout(_upright_size(image), config), config)
        return image_features(_decode(name, image), config)


def open_image(source: str | Path | bytes | Image.Image, config: ImageConfig) -> Image.Image:
    """Return a picture as fully decoded 8-bit RGB, upright, with transparency on white.

    source: a path, the bytes of a file, or a Pillow image (left unchanged); or what `unwrapped` makes one of. Of an
    animation, the first frame. The limits of the config are checked before decoding. 16-bit grey is scaled to 8 bits;
    colour profiles are left out.
    Raises MediaError when the source is missing, not a picture, damaged, too small or too large.
    """
    with _unwarned():
        name, image = _open_unread(source, config)
        opened = _decode(name, image)
        return opened.copy() if opened is source else opened


@contextmanager
def _unwarned() -> Iterator[None]:
    """Pillow warns of large pictures and odd metadata; the config decides instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(name: str, image: Image.Image) -> Image.Image:
    """Return a picture in RGB and upright."""
    try:
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        image.load()
        return _to_rgb(name, image)
    except MediaError:
        raise
    except Exception as error:  # decoders fail in many ways on damaged data
        why = _CLOSED if name == _GIVEN else "it is damaged or cut short; export it again"
        raise MediaError(f"{name} cannot be decoded ({error}), {why}") from error


def _orientation(image: Image.Image) -> object:
    """Return what EXIF says of the way up: 1 (upright) to 8, or nonsense."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the size that a picture has once it is upright, from its header."""
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def _decode_small(image: Image.Image, config: ImageConfig) -> Tensor | None:
    """Return a JPEG as (3, height, width) bytes, upright, at the lowest scale that has all pixels which crops need.

    None where Pillow has to decode it, or to say what is wrong with it.
    """
    if not isinstance(image, JpegImageFile) or image.mode not in ("L", "RGB") or not isinstance(image.fp, io.BytesIO):
        return None
    try:
        orientation, size = _orientation(image), _upright_size(image)
        sides = _layout(size, config)[1]
        width, height = sides if size == image.size else sides[::-1]
        # scales between a half and one take longer than the whole
        levels = torch.from_numpy(decode_jpeg(image.fp.getvalue(), min_width=width, min_height=height, min_factor=2))
    except Exception:  # decoders fail in many ways on damaged data
        return None
    levels = levels.permute((2, 1, 0) if orientation in (5, 6, 7, 8) else (2, 0, 1))
    flipped = [1] * (orientation in (3, 4, 7, 8)) + [2] * (orientation in (2, 3, 6, 7))
    return levels.flip(flipped) if flipped else levels


def _open_unread(source: str | Path | bytes | Image.Image, config: ImageConfig) -> tuple[str, Image.Image]:
    """Return what to call a picture, and it with its header read; the limits of the config are checked."""
    source = unwrapped(source, "image")
    if isinstance(source, Image.Image):
        name, image = _GIVEN, source
    else:
        name, data = read_source(source, "image", config.max_bytes)
        image = _read_header(name, data, config)
    width, height = image.size
    if min(width, height) < config.min_side:
        raise MediaError(
            f"{name}: {width}x{height} pixels, and each side must have at least {config.min_side}; "
            "give a larger picture"
        )
    if width * height > config.max_pixels:
        raise MediaError(
            f"{name}: {width}x{height} pixels, and at most {config.max_pixels:,} in all are read; "
            "scale it down or raise max_pixels"
        )
    return name, image


def _read_header(name: str, data: bytes, config: ImageConfig) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # Pillow tells the size in its message only
        count = f"{int(pixels[0]):,}" if pixels else "too many"
        raise MediaError(
            f"{name} has {count} pixels, and at most {config.max_pixels:,} are read; scale it down"
        ) from error
    except Exception as error:  # hostile headers fail in many ways
        marks = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
        known = data.startswith(marks) or data[:4] + data[8:12] == b"RIFFWEBP"  # RIFF alone may be a WAV
        what = "starts like a picture but is damaged or cut short" if known else "is not an image Pillow can read"
        raise MediaError(
            f"{name} {what} (first bytes {data[:8]!r}); "
            f"give a {'whole ' * known}PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF file"
        ) from error


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale, in Pillow also as 32-bit integers
        levels = np.asarray(image).astype(np.int32)
        if levels.min() < 0 or levels.max() > 65535:
            raise MediaError(
                f"{name} has grey levels from {levels.min()} to {levels.max()}, and they must lie in 0 to 65535; "
                "convert it to 8 or 16 bit"
            )
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_WHITE_IS_ZERO) == 0:  # Pillow turns 8 bits alone
            levels = 65535 - levels
        if isinstance(clear := image.info.get("transparency"), int):
            levels[levels == clear] = 65535
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise MediaError(f"{name} has floating-point pixels, which have no agreed white; convert it to 8 bit")
    if image.mode == "La":  # the only mode that Pillow turns into no other but one
        image = image.convert("LA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@cache
def _grids(max_crops: int) -> tuple[tuple[int, int], ...]:
    """Return every (columns, rows) of at most max_crops crops, fewest crops first.

    Among grids of equal size the order decides nothing: between the shapes of two such lies that of a grid with fewer
    crops, which is nearer to every picture that is equally far from both.
    """
    found = [(columns, rows) for columns in range(1, max_crops + 1) for rows in range(1, max_crops // columns + 1)]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def grid(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """Return (columns, rows) of crops for a picture of width x height pixels.

    The crops that cover the picture, or, when those are more than max_crops, the grid nearest in aspect ratio.
    Source: arXiv:2503.01743, section 2.2.1; InternVL 1.5, arXiv:2404.16821, section 3.3.
    """
    columns, rows = ceil(width / config.crop), ceil(height / config.crop)
    if columns * rows <= config.max_crops:
        return columns, rows
    nearest, best = (1, 1), float("inf")
    for candidate in _grids(config.max_crops):
        distance = abs(width / height - candidate[0] / candidate[1])
        cells = candidate[0] * candidate[1]
        if distance < best or (distance == best and width * height > 0.5 * config.crop**2 * cells):
            nearest, best = candidate, distance
    return nearest


def _normalise(levels: Tensor, out: Tensor) -> None:
    """Write bytes as numbers in [-1, 1]."""
    out.copy_(levels).div_(127.5).sub_(1)  # the same bits as (levels / 255 - 0.5) / 0.5, as two is a power of two


def _whole(grid: Tensor, crop: int) -> Tensor:
    """Return the view of a whole grid, (1, 3, crop, crop)."""
    return functional.interpolate(grid, size=(crop, crop), mode="bicubic", align_corners=False, antialias=False)


def _every(ratio: int, levels: Tensor) -> Tensor:
    """Return what _whole makes along the last axis, bar rounding: samples lie on a pixel or halfway between two."""
    if ratio % 2:
        return levels[..., ratio // 2 :: ratio]
    if ratio == 2:  # the outer two of four neighbours lie in the next blocks
        levels = torch.cat((levels[..., :1], levels, levels[..., -1:]), -1)
    fours = levels[..., max(0, ratio // 2 - 2) :].unfold(-1, 4, ratio)
    return fours.float() @ torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])  # cubic convolution, a = -0.75


# Three pairs, across and down: crops, pixels of the scaled picture, patches that hold some of it.
Layout = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def _layout(size: tuple[int, int], config: ImageConfig) -> Layout:
    """Return how a picture of a size, (width, height), is scaled and cut. Raises MediaError when it is too narrow."""
    own_width, own_height = size
    columns, rows = grid(own_width, own_height, config)
    full_width, full_height = config.crop * columns, config.crop * rows
    stretch_width, stretch_height = full_width / own_width, full_height / own_height
    if stretch_width < stretch_height:
        width, height = full_width, int(own_height * stretch_width)
    else:
        width, height = int(own_width * stretch_height), full_height
    if min(width, height) < THINNEST:
        raise MediaError(
            f"an image of {own_width}x{own_height} pixels would be scaled to {width}x{height}, and each side must "
            f"keep at least {THINNEST}; cut it into pieces of a less extreme shape"
        )
    valid_rows = rows * config.side - (full_height - height) // config.patch
    valid_columns = columns * config.side - (full_width - width) // config.patch
    return (columns, rows), (width, height), (valid_columns, valid_rows)


def count_image_tokens(source: str | Path | bytes | Image.Image, config: ImageConfig) -> int:
    """Return the tokens that a picture fills, from its header alone.

    Raises MediaError as open_image does for what the header tells.
    """
    with _unwarned():
        name, image = _open_unread(source, config)
        if image.format == "TIFF":  # Pillow turns it while decoding
            image = open_image(source, config)
        try:
            size = image.size if _is_upright_png(image) else _upright_size(image)
        except Exception as error:  # decoders fail in many ways on damaged data
            why = _CLOSED if name == _GIVEN else "its metadata are damaged; export it again"
            raise MediaError(f"{name} cannot be measured ({error}), {why}") from error
    _, _, (columns, rows) = _layout(size, config)
    return image_tokens(rows, columns, config.side)


def _is_upright_png(image: Image.Image) -> bool:
    """Tell whether a PNG has no place for an orientation: to look for one, Pillow would decode it whole."""
    if not isinstance(image, PngImageFile) or not isinstance(image.fp, io.BytesIO):
        return False
    data = image.fp.getvalue()
    return not any(mark in data for mark in (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type"))


def image_features(image: Image.Image, config: ImageConfig) -> tuple[dict[str, Tensor], int]:
    """Return the features of one picture and the tokens that it fills.

    image: RGB, as open_image returns it. With side = crop / patch and a grid of w columns and h rows, the features are
    "pixels" float32 (1 + h * w, 3, crop, crop), the global view first, then the crops row by row; "mask" bool
    (1 + h * w, side, side), true where a patch holds picture, be it in part (the global view is all true); "grid" int64
    (2,), h and w.
    Raises MediaError when the picture is not RGB or so narrow that its short side would be scaled below 10 pixels.
    Source: arXiv:2503.01743, section 2.2.1.
    """
    if image.mode != "RGB":
        raise MediaError(f"an image of mode {image.mode!r} must be RGB here; pass it through open_image first")
    layout = _layout(image.size, config)
    if not config.fast:
        image = image.resize(layout[1], Image.Resampling.BILINEAR)
    return _features(torch.from_numpy(np.array(image)).permute(2, 0, 1), layout, config)


def _features(levels: Tensor, layout: Layout, config: ImageConfig) -> tuple[dict[str, Tensor], int]:
    """Return the features of (3, height, width) bytes, which are scaled first where that is still to be done."""
    crop, side = config.crop, config.side
    (columns, rows), (width, height), (valid_columns, valid_rows) = layout
    padded = levels
    if levels.shape[1:] != (height, width):
        size = (height, width)
        # by these strides PyTorch sees that channels are last, by those of levels[None] it does not and takes longer
        one = levels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        padded = functional.interpolate(one, size, mode="bilinear", antialias=True, align_corners=False)[0].contiguous()
    if padded.shape[1:] != (crop * rows, crop * columns):
        padded = functional.pad(padded, (0, crop * columns - width, 0, crop * rows - height), value=255)
    tiles = padded.unflatten(1, (rows, crop)).unflatten(3, (columns, crop)).permute(1, 3, 0, 2, 4)
    pixels = torch.empty(1 + rows * columns, 3, crop, crop)
    for place in range(rows * columns):  # a crop at a time stays in the cache
        _normalise(tiles[place // columns, place % columns], pixels[1 + place])
    if config.fast:
        _normalise(_every(columns, _every(rows, padded.mT).mT), pixels[0])
    else:
        grid_ = pixels[1:].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        pixels[:1] = _whole(grid_.reshape(1, 3, crop * rows, -1), crop)

    valid = torch.zeros(rows * side, columns * side, dtype=torch.bool)
    valid[:valid_rows, :valid_columns] = True
    mask = valid.view(rows, side, columns, side).transpose(1, 2).reshape(-1, side, side)
    features = {
        "pixels": pixels,
        "mask": torch.cat((torch.ones(1, side, side, dtype=torch.bool), mask)),
        "grid": torch.tensor([rows, columns]),
    }
    return features, image_tokens(valid_rows, valid_columns, side)
