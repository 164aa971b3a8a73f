"""Bits per byte of running text: comparable between tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from math import log

import torch

from modalora.assistant import Assistant
from modalora.errors import DataError
from modalora.processing.processor import Row


@torch.inference_mode()
def bits_per_byte(assistant: Assistant, texts: Iterable[str], *, window: int = 768, rows: int = 8) -> float:
    """Return the bits that the model needs per UTF-8 byte, reading each text in windows that do not overlap.

    The first token of a window is predicted from <|endoftext|> alone. Raises DataError when there is no text.
    """
    tokenizer = assistant.processor.tokenizer
    start = tokenizer.control("<|endoftext|>")
    nats, size = 0.0, 0
    waiting: list[Row] = []

    def flush() -> float:
        batch = assistant.processor.collate(waiting).to(assistant.device)
        waiting.clear()
        values, _ = assistant.model.loss(batch)
        return float(values.double().sum())

    for text in texts:
        size += len(text.encode())
        ids = tokenizer.encode(text)
        for at in range(0, len(ids), window - 1):
            piece = [start, *ids[at : at + window - 1]]
            waiting.append(Row(ids=piece, labels=list(piece)))
            if len(waiting) == rows:
                nats += flush()
    if waiting:
        nats += flush()
    if not size:
        raise DataError("bits_per_byte needs at least one text that is not empty")
    return nats / log(2) / size
