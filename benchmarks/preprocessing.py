"""How long do pictures and sound take to become features, beside the usual recipes?

A 12-megapixel JPEG to crops beside Pillow and float32, step by step as the released processor has it; 30 s of sound
beside transformers' extractor. One thread, CPU milliseconds, the best of several repeats in turn; results are compared.

    python benchmarks/preprocessing.py
"""

from __future__ import annotations

import io
import os
from functools import partial

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import Phi4MultimodalFeatureExtractor

from modalora.processing.audio import log_mel
from modalora.processing.image import ImageConfig, grid, read_image
from timing import best, in_turn, where


def photo() -> bytes:
    """Return a JPEG of 4,032 x 3,024 with structure at every scale."""
    rng = np.random.default_rng(0)
    canvas = np.zeros((3024, 4032, 3), np.float32)
    for size in (6, 24, 96, 384, 1536):
        noise = rng.integers(0, 256, (max(2, size * 3 // 4), size, 3), dtype=np.uint8)
        canvas += np.asarray(Image.fromarray(noise).resize((4032, 3024), Image.Resampling.BICUBIC), np.float32) / 5
    buffer = io.BytesIO()
    Image.fromarray(canvas.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepare(data: bytes, config: ImageConfig) -> torch.Tensor:
    return read_image(data, config)[0]["pixels"]


def recipe(data: bytes) -> torch.Tensor:
    """Decode, resize, pad, normalise, look at the whole, cut: each step on its own, in float32."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    columns, rows = grid(*image.size, ImageConfig())
    wide, high = 448 * columns, 448 * rows
    scale = min(wide / image.width, high / image.height)
    size = (
        (wide, int(image.height * scale))
        if wide / image.width < high / image.height
        else (int(image.width * scale), high)
    )
    resized = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1).float() / 255
    padded = functional.pad(resized, (0, wide - size[0], 0, high - size[1]), value=1.0)
    normal = (padded - torch.full((3, 1, 1), 0.5)) / torch.full((3, 1, 1), 0.5)
    whole = functional.interpolate(normal[None], (448, 448), mode="bicubic", align_corners=False)
    crops = normal.reshape(3, rows, 448, columns, 448).permute(1, 3, 0, 2, 4).reshape(-1, 3, 448, 448)
    return torch.cat((whole, crops))


def main() -> None:
    torch.set_num_threads(1)
    print(f"{where()}\n")
    print("| work | ours ms | peer ms | ratio | largest difference | limit: decoding alone ms |")
    print("|---|---|---|---|---|---|")
    data = photo()
    told = recipe(data)
    decode = 1000 * best(lambda: Image.open(io.BytesIO(data)).load(), 5)
    for name, config in (("exact", ImageConfig()), ("fast", ImageConfig(fast=True))):
        ours = partial(prepare, data, config)
        off = (ours() - told).abs()
        mine, theirs = (1000 * x for x in in_turn({"": ours, "peer": partial(recipe, data)}, 40).values())
        found = f"{float(off.max()):.3f}, mean {float(off.mean()):.4f} of 2"
        print(f"| 12 MP JPEG, {name} | {mine:.0f} | {theirs:.0f} | {theirs / mine:.2f} | {found} | {decode:.0f} |")
    rng = np.random.default_rng(0)
    wave = (0.1 * rng.standard_normal(30 * 16_000)).astype(np.float32)
    extractor = Phi4MultimodalFeatureExtractor()
    own, told = (
        log_mel(wave, 16_000),
        extractor([wave], sampling_rate=16_000, return_tensors="pt").audio_input_features[0],
    )
    difference = float((own[:, :79] - told[:, :79]).abs().max())  # the peer's last filter takes in one bin more
    works = {"": lambda: log_mel(wave, 16_000), "peer": lambda: extractor([wave], sampling_rate=16_000)}
    mine, theirs = (1000 * x for x in in_turn(works, 30).values())
    fft = 1000 * best(lambda: np.fft.rfft(np.zeros((2998, 512), np.float32), axis=1), 5)
    print(f"| log-mel of 30 s | {mine:.1f} | {theirs:.1f} | {theirs / mine:.2f} | {difference:.1e} | FFT {fft:.1f} |")


if __name__ == "__main__":
    main()
