"""The whole model: a decoder, an encoder per modality, projector branches, and adapters chosen per row.

A modality is one row of MODALITIES: what encodes it and which projector branches it has. The rest of the model only
knows that media of a batch become features which fill a span of their row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modalora.contracts import IGNORED, NOWHERE, Batch, Cache, Media, Route, Step
from modalora.errors import ShapeError
from modalora.models.decoder import Decoder, DecoderConfig
from modalora.models.speech import SpeechConfig, SpeechEncoder
from modalora.models.vision import ImageEmbedder, VisionConfig
from modalora.nn.cache import KVCache
from modalora.nn.lora import LoraConfig
from modalora.nn.loss import EVEN
from modalora.nn.mlp import Projector
from modalora.nn.rope import is_long


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that config.json of a modalora folder tells about the networks."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    speech: SpeechConfig | None = None
    adapters: Mapping[str, LoraConfig] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Modality:
    """How one kind of media becomes features of the decoder's width."""

    encoder: Callable[[ModelConfig], nn.Module | None]
    width: Callable[[ModelConfig], int]
    branches: tuple[str, ...]  # projectors


MODALITIES: dict[str, Modality] = {
    "image": Modality(
        encoder=lambda config: ImageEmbedder(config.vision) if config.vision else None,
        width=lambda config: config.vision.hidden_size if config.vision else 0,
        branches=("vision",),
    ),
    "audio": Modality(
        encoder=lambda config: SpeechEncoder(config.speech) if config.speech else None,
        width=lambda config: config.speech.hidden_size if config.speech else 0,
        branches=("speech", "vision"),
    ),
}


class Multimodal(nn.Module):
    """A decoder that reads text, and any modality whose encoder its config names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.encoders, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        for name, modality in MODALITIES.items():
            encoder = modality.encoder(config)
            if encoder is not None:
                self.encoders[name] = encoder
                width = modality.width(config)
                self.projectors[name] = nn.ModuleDict(
                    {branch: Projector(width, config.decoder.hidden_size) for branch in modality.branches}
                )
        for name, lora in config.adapters.items():
            self.decoder.add_adapter(name, lora)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that the decoder holds."""
        return tuple(self.config.adapters)

    @property
    def branches(self) -> tuple[tuple[str, str], ...]:
        """Every modality with each of its projectors, in the order in which they run."""
        return tuple((name, branch) for name, own in self.projectors.items() for branch, _ in own.named_children())

    def smallest(self, modality: str, branch: str) -> Media:
        """Return a blank item, as small as the modality has them, that no row gets."""
        sizes = {"image": self.config.vision, "audio": self.config.speech}[modality]
        assert sizes is not None
        features, tokens = sizes.smallest()
        return Media(modality, features, NOWHERE, 0, tokens, branch)

    def embed(self, batch: Batch) -> Tensor:
        """Return the decoder's input, (batch, time, width): token embeddings, media spans filled with features."""
        hidden = self.decoder.embed(batch.input_ids)
        if not batch.media:
            return hidden
        features, rows, columns = self._features(batch)
        return hidden.index_put((rows, columns), features.to(hidden.dtype))

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return what media become, (tokens, width), and the row and column of each of these tokens, (tokens,).

        Encoders and projectors run in the model's order, not the batch's: ranks that share them must agree on it. What
        belongs to no row is left out behind them, which gives it a gradient of zero.
        """
        if unknown := {(item.modality, item.branch) for item in batch.media} - set(self.branches):
            raise ShapeError(f"this model has no encoder and projector for {' / '.join(min(unknown))}")
        features: list[Tensor] = []
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        for name, encoder in self.encoders.items():
            items = [item for item in batch.media if item.modality == name]
            if not items:
                continue
            encoded = encoder([dict(item.features) for item in items])
            by_branch: dict[str, list[int]] = defaultdict(list)
            for index, item in enumerate(items):
                if len(encoded[index]) != item.tokens:
                    raise ShapeError(f"{name} gave {len(encoded[index])} features for {item.tokens} placeholder tokens")
                by_branch[item.branch].append(index)
            for branch, projector in self.projectors.get_submodule(name).named_children():
                chosen = by_branch[branch]
                if not chosen:
                    continue
                features.append(projector(torch.cat([encoded[index] for index in chosen])))
                for index in chosen:
                    item = items[index]
                    rows.append(torch.full((item.tokens,), item.row))
                    columns.append(torch.arange(item.start, item.start + item.tokens))
        device = batch.input_ids.device
        found, at, along = torch.cat(features), torch.cat(rows), torch.cat(columns)
        if NOWHERE in at:
            real = (at != NOWHERE).nonzero().squeeze(1)
            found, at, along = found[real.to(device)], at[real], along[real]
        return found, at.to(device), along.to(device)

    def hidden(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Return the decoder's final states, (batch, time, width), of whole rows from their first token on."""
        lengths = batch.lengths.tolist()
        long = torch.tensor(is_long(self.config.decoder.rope, lengths), device=batch.input_ids.device)
        step = Step(lengths=batch.lengths, route=batch.route, long=long, cache=cache)
        states: Tensor = self.decoder(self.embed(batch), step)
        return states

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (batch, time, vocab)."""
        return self.decoder.head(self.hidden(batch))

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for this many rows."""
        return KVCache(self.config.decoder.num_hidden_layers, batch, self.decoder.embed_tokens.weight.device)

    def read(self, batch: Batch, cache: Cache) -> Tensor:
        """Read whole prompts into an empty cache; return logits of each row's last token, (batch, vocab)."""
        states = self.hidden(batch, cache)
        rows = torch.arange(len(states), device=states.device)
        return self.decoder.head(states[rows, batch.lengths - 1])

    def read_next(self, ids: Tensor, route: Route, cache: Cache) -> Tensor:
        """Read one more token per row, ids (batch,); return logits, (batch, vocab)."""
        lengths = [length + 1 for length in cache.lengths.tolist()]
        long = torch.tensor(is_long(self.config.decoder.rope, lengths), device=ids.device)
        step = Step(lengths=torch.ones_like(ids), route=route, long=long, cache=cache)
        return self.decoder.head(self.decoder(self.decoder.embed(ids[:, None]), step)[:, 0])

    def is_long(self, length: int) -> bool:
        """Tell whether a row of this length uses the rotary table for long windows."""
        return is_long(self.config.decoder.rope, [length])[0]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the next-token losses of the labelled tokens and the row that each belongs to, both (labelled,).

        The rows lie end to end in one sequence, those of one adapter together: nothing is computed for padding.
        Only labelled positions go through the output projection, which makes no logits.
        """
        if batch.labels is None:
            raise ShapeError("loss needs a batch with labels; build it with Processor.training_batch")
        targets = batch.labels[:, 1:]
        rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
        states, starts = self._end_to_end(batch)
        return self.decoder.losses(states[starts[rows] + columns], targets[rows, columns]), rows

    def _end_to_end(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the final states of all real tokens, (tokens, width), and where each row starts, (batch,).

        A last row of up to seven tokens that nobody reads makes the number of tokens even for products.
        """
        lengths, device = batch.lengths.tolist(), batch.input_ids.device
        order = sorted(range(len(lengths)), key=lambda row: str(batch.route.adapters[row]))
        spans, adapters = [lengths[row] for row in order], [batch.route.adapters[row] for row in order]
        ids = [batch.input_ids[row, : lengths[row]] for row in order]
        starts = torch.zeros(len(lengths), dtype=torch.long, device=device)
        starts[order] = torch.tensor((0, *spans[:-1]), device=device).cumsum(0)
        if filler := -sum(spans) % EVEN:
            ids.append(ids[0].new_zeros(filler))
            spans.append(filler)
            adapters.append(None)
        hidden = self.decoder.embed(torch.cat(ids)[None])
        if batch.media:
            features, rows, columns = self._features(batch)
            hidden = hidden.index_put((torch.zeros_like(rows), starts[rows] + columns), features.to(hidden.dtype))
        step = Step(
            lengths=torch.tensor(spans, device=device),
            route=Route(tuple(adapters), tuple(spans)),
            long=torch.tensor(is_long(self.config.decoder.rope, spans), device=device),
        )
        return self.decoder(hidden, step)[0], starts


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, the unit of freezing.

    Parts are "decoder", "adapter.NAME", "MODALITY.encoder" and "MODALITY.projector.BRANCH".
    """
    pieces = name.split(".")
    for marker in ("lora_A", "lora_B"):
        if marker in pieces:
            return f"adapter.{pieces[pieces.index(marker) + 1]}"
    if pieces[0] == "encoders":
        return f"{pieces[1]}.encoder"
    if pieces[0] == "projectors":
        return f"{pieces[1]}.projector.{pieces[2]}"
    return "decoder"


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return the numbers stored per part, buffers of the state dict included."""
    counts: dict[str, int] = defaultdict(int)
    for name, tensor in model.state_dict().items():
        counts[part_of(name)] += tensor.numel()
    return dict(counts)
