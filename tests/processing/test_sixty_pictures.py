"""Sixty shapes of pictures against an independent recipe: grid, mask, positions of pixels and token count."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from modalora.processing.image import ImageConfig, image_features

SHAPES = [
    (448, 448), (28, 448), (449, 448), (640, 480), (1000, 700), (1344, 1344), (1920, 1080), (300, 2000), (3000, 300),
    (5000, 400), (4032, 3024), (2688, 2688), (8, 8), (10, 400), (447, 449), (896, 896), (897, 895),
]  # fmt: skip
_rng = np.random.default_rng(0)
SHAPES += [(int(w), int(h)) for w, h in np.exp(_rng.uniform(np.log(40), np.log(2500), (60 - len(SHAPES), 2)))]


def recipe(image: Image.Image) -> tuple[np.ndarray, np.ndarray, tuple[int, int], int]:
    """The released steps one by one: crops in [-1, 1], patch masks, (columns, rows), tokens."""
    width, height = image.size
    columns, rows = ceil(width / 448), ceil(height / 448)
    if columns * rows > 36:
        candidates = sorted(
            {(i, j) for i in range(1, 37) for j in range(1, 37) if i * j <= 36}, key=lambda g: g[0] * g[1]
        )
        best = float("inf")
        for i, j in candidates:
            difference = abs(width / height - i / j)
            if difference < best:
                best, (columns, rows) = difference, (i, j)
            elif difference == best and width * height > 0.5 * 448 * 448 * i * j:
                columns, rows = i, j
    right, down = 448 * columns / width, 448 * rows / height
    size = (448 * columns, int(height * right)) if right < down else (int(width * down), 448 * rows)
    canvas = np.full((448 * rows, 448 * columns, 3), 255, np.uint8)
    canvas[: size[1], : size[0]] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    pixels = (canvas.astype(np.float64) / 255 - 0.5) / 0.5
    mask = np.ones((32 * rows, 32 * columns), bool)
    bottom, side = 448 * rows - size[1], 448 * columns - size[0]
    if side >= 14:
        mask[:, mask.shape[1] - side // 14 :] = False
    if bottom >= 14:
        mask[mask.shape[0] - bottom // 14 :] = False
    whole = functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None], (448, 448), mode="bicubic", align_corners=False
    )[0]
    crops, masks = [whole.numpy()], [np.ones((32, 32), bool)]
    for row in range(rows):
        for column in range(columns):
            crops.append(pixels[448 * row : 448 * row + 448, 448 * column : 448 * column + 448].transpose(2, 0, 1))
            masks.append(mask[32 * row : 32 * row + 32, 32 * column : 32 * column + 32])
    halved = mask[::2, ::2]
    tokens = 256 + 1 + int(halved.sum()) + int(halved[:, 0].sum()) + 16
    return np.stack(crops), np.stack(masks), (columns, rows), tokens


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_a_picture_becomes_what_the_released_steps_make_of_it(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(shape[0]).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    crops, masks, (columns, rows), tokens = recipe(image)
    features, counted = image_features(image, ImageConfig())
    assert features["grid"].tolist() == [rows, columns]
    assert counted == tokens
    assert np.array_equal(features["mask"].numpy(), masks)
    # float32 of values up to 1.3; the bicubic view sums 16 products
    assert np.abs(features["pixels"].numpy() - crops).max() < 5e-6
