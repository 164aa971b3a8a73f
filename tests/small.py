"""What tests of several rooms write again and again: small models, a tokenizer, books, a prompt as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import torch
from pyarrow import parquet

from modalora.models.decoder import DecoderConfig, Phi3Small
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import tiny
from modalora.nn.mask import BlockSparse
from modalora.nn.rope import Plain
from modalora.processing.chat import Piece
from modalora.processing.tokenizer import TextTokenizer

SMALL = ModelConfig(  # a Phi-3-small
    decoder=DecoderConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope=Plain(theta=1e6, window=512),
        phi3_small=Phi3Small(blocks=BlockSparse(block=4, local=2, stride=3), hidden_tokens=(7, 9)),
    )
)  # fmt: skip


def shaken(config: ModelConfig | None = None, seed: int = 0) -> Multimodal:
    """A model moved away from its first values, so that what it says depends on all that it read; tiny."""
    torch.manual_seed(seed)
    model = Multimodal(config or tiny()).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def fox() -> TextTokenizer:
    """A tokenizer of as many ids as tiny models have, for tests to which its words do not matter."""
    return TextTokenizer.train(["the quick brown fox jumps over the lazy dog; seven blue boxes. " * 4], 320)


def write_books(folder: Path, *texts: str, split: str = "train") -> None:
    """Write the books of a split into a data folder."""
    (folder / "books").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"text": list(texts)}), folder / "books" / f"{split}.parquet")


def as_text(pieces: Sequence[Piece]) -> str:
    """The prompt as it is shown to people; media as numbered tags."""
    shown: list[str] = []
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts[piece.kind] += 1
        shown.append(piece.value if piece.kind in ("text", "control") else f"<|{piece.kind}_{counts[piece.kind]}|>")
    return "".join(shown)
