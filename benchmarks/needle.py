"""What a needle probe costs, and what scoring only the answers saves.

Two questions, each answered as a ratio within one process:
- answers only: the same documents with all their logits made, as a loss over whole documents with a mask does it. The
  limit is the decoder's own forward pass, which both need;
- several needles per document: one forward pass for k questions, against k documents with one each. The limit is k.

    .venv/bin/python benchmarks/needle.py [--size window-study] [--length 1024] [--text FILE] [--vocab 200064]
        [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

from modalora.contracts import Batch, Route
from modalora.evaluation.documents import load_texts, make_documents
from modalora.evaluation.needle import Document, answer_losses, ask_probes
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import SIZES
from modalora.nn.products import wide_products
from modalora.processing.tokenizer import TextTokenizer
from timing import CPU, best

README = Path(__file__).parents[1] / "README.md"


@torch.no_grad()
def all_logits(model: Multimodal, documents: list[Document]) -> torch.Tensor:
    """The same losses from every logit."""
    device = model.device
    ids = torch.tensor([document.ids for document in documents], device=device)
    lengths = torch.full((len(ids),), ids.shape[1], device=device)
    logits = model(Batch(ids, lengths, Route((None,) * len(ids))))
    losses = []
    for row, document in enumerate(documents):
        at = torch.tensor(document.answers, device=device)
        losses.append(functional.cross_entropy(logits[row, at - 1].float(), ids[row, at]))
    return torch.stack(losses)


@torch.no_grad()
def forward_only(model: Multimodal, documents: list[Document]) -> torch.Tensor:
    device = model.device
    ids = torch.tensor([document.ids for document in documents], device=device)
    return model.hidden(Batch(ids, torch.full((len(ids),), ids.shape[1], device=device), Route((None,) * len(ids))))


@wide_products()  # for both sides
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", default="window-study", choices=sorted(SIZES))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=0, help="words of the output projection, where not the size's own")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--text", type=Path, help="a long text; else the README over and over")
    given = parser.parse_args()
    texts = load_texts(given.text) if given.text else [README.read_text(encoding="utf-8") * 20]
    tokenizer = TextTokenizer.train([text[:500_000] for text in texts], 1024)
    config = SIZES[given.size]()
    decoder = replace(config.decoder, vocab_size=max(given.vocab or config.decoder.vocab_size, 1024))
    torch.manual_seed(0)
    device = given.device
    model = Multimodal(replace(config, decoder=decoder)).eval().to(device)

    def seconds(work: Callable[[], object]) -> float:
        return best(work, 4, device)

    def made(needles: int) -> list[Document]:
        return make_documents(
            tokenizer, texts, given.rows, length=given.length, part="search", style="words", needles=needles
        )

    one, several = made(1), made(given.needles)
    torch.testing.assert_close(answer_losses(model, one), all_logits(model, one), atol=1e-4, rtol=1e-4)
    limit = seconds(lambda: forward_only(model, one))
    ours, peer = seconds(lambda: answer_losses(model, one)), seconds(lambda: all_logits(model, one))
    print(
        f"{given.size}, vocabulary {decoder.vocab_size:,}, {given.rows} documents of {given.length} tokens, {device}\n"
    )
    print("| answers | seconds | against all logits | of the decoder's pass alone |\n|---|---|---|---|")
    print(f"| all logits | {peer:.3f} | 1.00 | {peer / limit:.2f} |")
    print(f"| answers only | {ours:.3f} | {ours / peer:.2f} | {ours / limit:.2f} |")
    single = seconds(lambda: ask_probes(model, one, rows=given.rows)) / given.rows
    many = seconds(lambda: ask_probes(model, several, rows=given.rows)) / (given.rows * given.needles)
    print("\n| needles of a document | seconds a question | times cheaper (limit) |\n|---|---|---|")
    print(f"| 1 | {single:.4f} | 1.0 |")
    print(f"| {given.needles} | {many:.4f} | {single / many:.1f} ({given.needles}) |")


if __name__ == "__main__":
    main()
