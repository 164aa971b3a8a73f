"""What does it cost to mix modalities in a batch, instead of one modality per batch?

The same 32 rows (text, picture, speech, picture with speech) in four micro-batches of eight: once each of one kind,
once two of every kind. Forward and backward of nano's adapters and projectors as in the training loop, one thread, CPU
seconds, the best of several in turn; text has nothing to train, and so no backward pass. The released code of
Phi-4-Multimodal cannot mix at all; the limit is 1. Gradients of both are compared.

    python benchmarks/mixed_batches.py
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import date

import numpy as np
import torch
from PIL import Image

import modalora
from modalora.contracts import Batch
from modalora.parallel.engine import Single
from modalora.processing.processor import Processor, Row
from modalora.training.objectives import NextToken
from modalora.training.optimizer import freeze
from timing import best

ROWS = 8  # of each kind, and in each micro-batch


def rows(processor: Processor) -> list[list[Row]]:
    """Return rows of every kind, all of about the same number of tokens."""
    rng = np.random.default_rng(0)
    kinds = []
    for media, words in (((), 190), (("image",), 20), (("audio",), 130), (("image", "audio"), 5)):
        own = []
        for _ in range(ROWS):
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
    torch.set_num_threads(1)
    assistant = modalora.load("nano")
    model, collate = assistant.model.train(), assistant.processor.collate
    trained = freeze(model, ["adapter.*", "image.projector.*", "audio.projector.*"])
    engine = Single()
    engine.shard(model, NextToken(model))
    kinds = rows(assistant.processor)
    alone = [collate(own) for own in kinds]
    share = ROWS // len(kinds)
    mixed = [collate([row for own in kinds for row in own[at : at + share]]) for at in range(0, ROWS, share)]

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
    for _ in range(10):
        one, many = min(one, best(lambda: learn(alone), 1)), min(many, best(lambda: learn(mixed), 1))
    tokens = sum(int(batch.lengths.sum()) for batch in mixed)
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, 1 thread, {tokens:,} tokens\n")
    print("| batches | s | tokens/s |\n|---|---|---|")
    print(f"| one modality each | {one:.2f} | {tokens / one:,.0f} |")
    print(f"| mixed | {many:.2f} | {tokens / many:,.0f} |")
    print(f"\nmixed / one modality: {one / many:.3f} of the throughput (aim 0.95, limit 1)")
    print(f"gradients differ by {off:.1e} of each tensor's largest (bf16)")


if __name__ == "__main__":
    main()
