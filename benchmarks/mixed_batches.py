"""What does it cost to mix modalities in a batch, instead of one modality per batch?

The same rows (text, picture, speech, picture with speech) in four micro-batches of 8, of 16 and of 32: once each of one
kind, once as many of every kind. Forward and backward of adapters and projectors as in the training loop, one thread,
CPU seconds, the best of several in turn; text has nothing to train, and so no backward pass. The released code of
Phi-4-Multimodal cannot mix at all; the limit is 1. Gradients of both are compared. The model is nano, or a decoder of
Phi-4-Mini's width (4 layers, adapters of Phi-4-Multimodal's ranks, random) behind nano's encoders.

    python benchmarks/mixed_batches.py [--size nano phi4] [--rows 8 16 32]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import modalora
from modalora.contracts import Batch
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import phi4_multimodal
from modalora.nn.rope import Plain
from modalora.parallel.engine import Single
from modalora.processing.processor import Processor, Row
from modalora.training.objectives import NextToken
from modalora.training.optimizer import freeze
from timing import best, where


def make_rows(processor: Processor, count: int) -> list[list[Row]]:
    """Return rows of every kind, count of each, all of about the same number of tokens."""
    rng = np.random.default_rng(0)
    kinds = []
    for media, words in (((), 190), (("image",), 20), (("audio",), 130), (("image", "audio"), 5)):
        own = []
        for _ in range(count):
            payloads = {
                "image": Image.fromarray(rng.integers(0, 255, (100, 400, 3), dtype=np.uint8)),
                "audio": (0.1 * rng.standard_normal(4 * 16_000).astype(np.float32), 16_000),
            }
            parts = [{"type": kind, kind: payloads[kind]} for kind in media]
            text = {"type": "text", "text": "How many of them are there? " + "one two " * (words // 2)}
            messages = [
                {"role": "user", "content": [*parts, text]},
                {"role": "assistant", "content": "There are seven."},
            ]
            own.append(processor.row(messages, answer=False))
        kinds.append(own)
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32], help="of a micro-batch, a multiple of 4")
    parser.add_argument("--size", nargs="+", default=["nano"], choices=["nano", "phi4"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{where()}; aim 0.95, limit 1\n")
    print("| size | rows | tokens | s, one modality each | s, mixed | mixed / one modality | gradients apart |")
    print("|---|---|---|---|---|---|---|")
    for size in asked.size:
        for rows in asked.rows:
            compare(size, rows)


def build(size: str) -> tuple[Multimodal, Processor]:
    """Return nano, or one with a decoder of Phi-4-Mini's width, and nano's processor."""
    assistant = modalora.load("nano")
    if size == "nano":
        return assistant.model, assistant.processor
    own, large = assistant.model.config, phi4_multimodal()
    decoder = replace(
        large.decoder, num_hidden_layers=4, vocab_size=own.decoder.vocab_size, rope=Plain(rotated=0.75, window=1024)
    )
    torch.manual_seed(0)
    model = Multimodal(replace(own, decoder=decoder, adapters=large.adapters))
    model.decoder.to(torch.bfloat16)
    for linear in model.decoder.routed().values():
        for up in linear.lora_B.values():  # zero in a fresh adapter, which would leave A without a gradient
            torch.nn.init.normal_(up, std=1e-3)
    return model, assistant.processor


def compare(size: str, rows: int) -> None:
    """Print a line of the table. Gradients: of each tensor's largest, bf16."""
    model, processor = build(size)
    model, collate = model.train(), processor.collate
    trained = freeze(model, ["adapter.*", "image.projector.*", "audio.projector.*"])
    engine = Single()
    engine.shard(model, NextToken(model))
    kinds = make_rows(processor, rows)
    alone = [collate(own) for own in kinds]
    share = rows // len(kinds)
    mixed = [collate([row for own in kinds for row in own[at : at + share]]) for at in range(0, rows, share)]

    def learn(batches: Sequence[Batch]) -> None:
        for parameter in trained.values():
            parameter.grad = None
        for batch in engine.level(batches):
            with torch.autocast("cpu", torch.bfloat16):
                losses = engine.losses(batch)
            engine.backward(losses.values.sum(), last=True)

    for linear in model.decoder.routed().values():  # the same function of a row in any batch, so no dropout
        linear.adapters = {name: replace(config, lora_dropout=0.0) for name, config in linear.adapters.items()}
    learn(alone)
    told = {name: own.grad.clone() for name, own in trained.items() if own.grad is not None}
    learn(mixed)
    off = max(
        float((trained[name].grad - own).abs().max() / own.abs().max().clamp(min=1e-9)) for name, own in told.items()
    )
    one, many = float("inf"), float("inf")
    for _ in range(10 if size == "nano" else 3):
        one, many = min(one, best(lambda: learn(alone), 1)), min(many, best(lambda: learn(mixed), 1))
    tokens = sum(int(batch.lengths.sum()) for batch in mixed)
    print(f"| {size} | {rows} | {tokens:,} | {one:.2f} | {many:.2f} | {one / many:.3f} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()
