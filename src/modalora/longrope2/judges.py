"""Judges of rotary divisors that ask a model: needle documents, read whole or, as a surrogate, only where they answer.

Candidates are rows of one forward pass, each with its own rotary table; the model and its config stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modalora.contracts import Batch, Rotations, Route, Step
from modalora.errors import ConfigError
from modalora.evaluation.needle import Document, answer_losses
from modalora.longrope2.factors import Factors
from modalora.models.multimodal import Multimodal
from modalora.nn.products import wide_products
from modalora.nn.rope import rotate, turned


def rotations(model: Multimodal, candidates: Sequence[Factors]) -> Rotations:
    """Return a row's rotary table for each candidate: its long one, as the model's config would have it."""
    config, device = model.config.decoder, model.device
    ropes = [candidate.rope(config.rope) for candidate in candidates]
    tables = [rope.frequencies(config.head_dim, long=True) for rope in ropes]
    scales = [rope.attention_factor(long=True) for rope in ropes]
    return Rotations(torch.stack(tables).to(device), torch.tensor(scales, device=device))


class NeedleJudge:
    """Reads needle documents with each candidate; only the answers go through the output projection.

    rows: of one forward pass.
    """

    def __init__(self, model: Multimodal, documents: Sequence[Document], *, rows: int = 8) -> None:
        if not documents or rows < 1:
            raise ConfigError(f"{len(documents)} documents, rows={rows}: a judge needs one of each at least")
        self.model, self.texts, self.rows = model, tuple(documents), rows

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.texts)

    @torch.inference_mode()
    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        """Return mean answer nats, (candidates, documents)."""
        tables = rotations(self.model, candidates)
        pairs = [(own, number) for own in range(len(candidates)) for number in documents]
        found = []
        for at in range(0, len(pairs), self.rows):
            few = pairs[at : at + self.rows]
            index = [own for own, _ in few]
            own = Rotations(tables.frequencies[index], tables.scale[index])
            found.append(answer_losses(self.model, [self.texts[number] for _, number in few], own))
        return torch.cat(found).view(len(candidates), len(documents)).cpu()


LEAD = 16  # tokens before the first answer


class Surrogate:
    """Reads documents whole with the first candidate alone; of the others it computes only the end, with the answers.

    For these, keys and values of what stands before are the first candidate's, turned by the other's angles. They are
    exact in the first layer; deeper ones read hidden states of the first candidate, which is the error. The end is all
    from LEAD tokens before the first answer on: T tokens take their keys' rotation and the end's attention instead of
    a pass over T.
    """

    def __init__(self, model: Multimodal, documents: Sequence[Document]) -> None:
        if not documents:
            raise ConfigError("0 documents: a surrogate needs one at least")
        self.model, self.texts = model, tuple(documents)
        self._base: Factors | None = None
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by document: keys and values of each layer

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.texts)

    @torch.inference_mode()
    @wide_products()
    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        """Return mean answer nats, (candidates, documents), nearly; the first candidate's are exact."""
        if candidates[0] != self._base:
            self._base, self._kept = candidates[0], {}
        tables = rotations(self.model, candidates)
        return torch.stack([self._document(number, tables) for number in documents], dim=1).cpu()

    def _document(self, number: int, tables: Rotations) -> Tensor:
        text, decoder, rows = self.texts[number], self.model.decoder, len(tables.scale)
        start = max(1, text.answers[0] - LEAD)
        if number not in self._kept:
            self._kept[number] = self._read(text, start, Rotations(tables.frequencies[:1], tables.scale[:1]))
        device = tables.scale.device
        ids = torch.tensor(text.ids, device=device)
        end = torch.full((rows,), len(ids) - start, device=device)
        cache = _Before(self._kept[number], start, tables)
        long = torch.ones(rows, dtype=torch.bool, device=device)
        step = Step(lengths=end, route=Route((None,) * rows), long=long, cache=cache, rotations=tables)
        states = decoder(decoder.embed(ids[start:].expand(rows, -1)), step)
        answers = torch.tensor(text.answers, device=device)
        targets = ids[answers].expand(rows, -1)
        losses = decoder.losses(states[:, answers - 1 - start].flatten(0, 1), targets.flatten())
        return losses.view(rows, -1).mean(1)

    def _read(self, text: Document, start: int, table: Rotations) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's keys, not turned, and values, (1, start, kv_heads, head_dim), of a whole pass."""
        decoder = self.model.decoder
        kept: list[tuple[Tensor, Tensor]] = []
        size = decoder.config
        heads = (size.num_attention_heads, size.num_key_value_heads, size.num_key_value_heads)

        def keep(module: nn.Module, given: Any, made: Tensor) -> None:
            _, keys, values = made[:, :start].unflatten(-1, (-1, size.head_dim)).split(heads, dim=2)
            kept.append((keys.clone(), values.clone()))

        hooks = [layer.get_submodule("self_attn.qkv_proj").register_forward_hook(keep) for layer in decoder.layers]
        try:
            ids = torch.tensor([text.ids[:start]], device=table.scale.device)
            lengths = torch.tensor([start], device=ids.device)
            self.model.hidden(Batch(ids, lengths, Route((None,))), rotations=table)
        finally:
            for hook in hooks:
                hook.remove()
        return kept


class _Before:
    """What stands before the end of a document, as a decoder's cache: one row's keys, turned by each table."""

    def __init__(self, kept: Sequence[tuple[Tensor, Tensor]], start: int, tables: Rotations) -> None:
        self._kept, self._rows = kept, len(tables.scale)
        self._lengths = torch.full((self._rows,), start, device=tables.scale.device)
        positions = torch.arange(start, device=tables.scale.device).expand(self._rows, -1)
        self._cos, self._sin = turned(positions, tables.frequencies[:, None], tables.scale[:, None, None])

    @property
    def lengths(self) -> Tensor:
        """Tokens held per row, (batch,)."""
        return self._lengths

    @property
    def counts(self) -> list[int]:
        """The same as plain numbers."""
        return self._lengths.tolist()

    @property
    def is_even(self) -> bool:
        """True: every row has the same tokens."""
        return True

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was kept, turned, and behind it this call's keys and values."""
        before, said = (kept.expand(self._rows, -1, -1, -1) for kept in self._kept[layer])
        return torch.cat((rotate(before, self._cos, self._sin), keys), 1), torch.cat((said, values), 1)

    def advance(self, lengths: Tensor) -> None:
        """Keep nothing: the call reads to the end."""
