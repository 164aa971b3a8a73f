"""The whole model: a decoder, an encoder per modality, projector branches, and adapters chosen per row.

Of a modality these networks know its sizes alone (`EncoderConfig`), which build the encoder and name the projectors;
what else belongs to it stands in its row (modality.py). Media of a batch become features that fill a span of their row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modalora.contracts import IGNORED, NOWHERE, Batch, Cache, Cut, Media, Rotations, Route, Step
from modalora.errors import ConfigError, ModaloraError, ShapeError, listed
from modalora.models.decoder import Decoder, DecoderConfig, DecoderLayer
from modalora.models.speech import ConformerBlock, SpeechConfig
from modalora.models.vision import VisionConfig, VisionLayer
from modalora.nn import recompute as general
from modalora.nn.cache import KVCache
from modalora.nn.dense import Product
from modalora.nn.lora import LoraConfig, check_name
from modalora.nn.loss import EVEN
from modalora.nn.mlp import Projector
from modalora.nn.packed import can_pack
from modalora.nn.products import wide_products
from modalora.nn.rope import DynamicNtk, Rope, is_long, table_number, tables


class EncoderConfig(Protocol):
    """Sizes of one modality's networks: a frozen dataclass of plain values."""

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the projectors; the first serves rows that hold this modality alone."""
        ...

    @property
    def hidden_size(self) -> int:
        """Channels of a token that the encoder gives."""
        ...

    def encoder(self) -> nn.Module:
        """Return a module that takes features, a list of dicts of tensors, and returns a list of (tokens, channels)."""
        ...

    def smallest(self) -> tuple[dict[str, Tensor], int]:
        """Return the features of a blank item, as small as there are, and its tokens."""
        ...


FEW = 64  # tokens of a prompt, below which a first meeting with its shapes costs more than wide products gain
MODALITIES = {"image": "vision", "audio": "speech"}  # modality -> the field of ModelConfig that has its sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that config.json of a modalora folder tells about the networks.

    encoders: the sizes of every further modality (EncoderConfig). branches: projectors of a modality besides its own;
    "BRANCH-ADAPTER" stands in for BRANCH in the rows of that adapter. aliases: an adapter that routes name -> the one
    that this model has in its place.
    """

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    speech: SpeechConfig | None = None
    adapters: Mapping[str, LoraConfig] = field(default_factory=dict)
    encoders: Mapping[str, Any] = field(default_factory=dict)
    branches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def modalities(self) -> dict[str, EncoderConfig]:
        """Sizes by modality, of those that the model reads."""
        fixed = {"image": self.vision, "audio": self.speech}
        return {name: sizes for name, sizes in (fixed | dict(self.encoders)).items() if sizes is not None}

    def projectors(self, modality: str) -> tuple[str, ...]:
        """Return the names of a modality's projectors."""
        return (*self.modalities[modality].branches, *self.branches.get(modality, ()))


class Multimodal(nn.Module):
    """A decoder that reads text, and any modality whose encoder its config names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.cut: Cut | None = None  # how processes that train together share the tokens of a micro-batch
        self.decoder = Decoder(config.decoder)
        self.encoders, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        for name, sizes in config.modalities.items():
            self._add_networks(name, sizes, config.projectors(name))
        for name, lora in config.adapters.items():
            self.decoder.add_adapter(name, lora)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.decoder.embed_tokens.weight.device

    def _add_networks(self, modality: str, sizes: EncoderConfig, branches: Sequence[str]) -> None:
        self.encoders[modality] = make_encoder(modality, sizes)
        self.projectors[modality] = nn.ModuleDict(
            {branch: Projector(sizes.hidden_size, self.config.decoder.hidden_size) for branch in branches}
        )

    def set_rope(self, rope: Rope) -> None:
        """Replace the rotary positions, window included; no weight changes. Raises ShapeError for other heads'."""
        self.config = replace(self.config, decoder=replace(self.config.decoder, rope=rope))
        self.decoder.config = self.config.decoder

    def pack(self, done: Callable[[Tensor], None] = lambda weight: None) -> None:
        """Keep matrices in the order that bf16 products on this CPU read; the model is then for reading (Decoder.pack).

        done: called with each plain matrix that is no longer needed. Raises ConfigError where nothing is gained.
        """
        self.decoder.pack(done)
        for network in (self.encoders, self.projectors):
            for module in network.modules():
                if isinstance(module, Product) and can_pack(module.weight):
                    module.pack(done)

    def add_modality(self, name: str, sizes: EncoderConfig) -> None:
        """Add a modality with fresh networks; the decoder keeps every bit. Raises ConfigError when there is one."""
        if name in self.encoders:
            raise ConfigError(f"this model has the modality {name!r} already, with {self.config.modalities[name]}")
        config = replace(self.config, encoders={**self.config.encoders, name: sizes})
        self._add_networks(name, sizes, config.projectors(name))
        self.config = config
        for module in (self.encoders[name], self.projectors[name]):
            module.to(self.decoder.embed_tokens.weight).train(self.training)

    def add_adapter(self, name: str, lora: LoraConfig) -> None:
        """Add a LoRA adapter that starts as no change. Raises ConfigError when it cannot have that name, or one has."""
        check_name(name)
        if name in self.config.adapters:
            raise ConfigError(f"this model has the adapter {name!r} already; train it, or choose another name")
        self.decoder.add_adapter(name, lora)
        self.config = replace(self.config, adapters={**self.config.adapters, name: lora})

    def add_branch(self, modality: str, branch: str) -> Projector:
        """Add a projector to a modality and return it."""
        own = self.config.branches
        self.config = replace(self.config, branches={**own, modality: (*own.get(modality, ()), branch)})
        projector = Projector(self.config.modalities[modality].hidden_size, self.config.decoder.hidden_size)
        self.projectors.get_submodule(modality).add_module(branch, projector)
        return projector.to(self.decoder.embed_tokens.weight).train(self.training)

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
        features, tokens = self.config.modalities[modality].smallest()
        return Media(modality, features, NOWHERE, 0, tokens, branch)

    def embed(self, batch: Batch) -> Tensor:
        """Return the decoder's input, (batch, time, width): token embeddings, media spans filled with features."""
        hidden = self.decoder.embed(batch.input_ids)
        if not batch.media:
            return hidden
        features, rows, columns = self._features(batch)
        return hidden.index_put((rows, columns), features.to(hidden.dtype))

    def encode(self, modality: str, items: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Return what a modality's encoder makes of features, (tokens, hidden_size) each, as its projectors read it.

        Raises ShapeError where an encoder from elsewhere fails, or gives anything else.
        """
        encoder, given = self.encoders[modality], [dict(item) for item in items]
        if modality in MODALITIES:
            found: list[Tensor] = encoder(given)
            return found
        who = f"the encoder of the modality {modality!r}"
        try:
            told = encoder(given)
        except (ModaloraError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # it is someone else's code
            raise ShapeError(
                f"{who} fails with {type(error).__name__}: {' '.join(str(error).split()):.200}; mend it, or the "
                "features that it is given"
            ) from error
        width = self.config.modalities[modality].hidden_size
        if not (
            (isinstance(told, list | tuple) or (isinstance(told, Tensor) and told.ndim == 3))
            and len(told) == len(items)
            and all(isinstance(one, Tensor) and one.is_floating_point() for one in told)
            and all(one.ndim == 2 and one.shape[1] == width for one in told)
        ):
            raise ShapeError(
                f"{who} gave {_shown(told)} for {len(items)} item(s); return a list of float tensors, (tokens, {width})"
                " each"
            )
        dtype = next(self.projectors.get_submodule(modality).parameters()).dtype
        return [one.to(dtype) for one in told]

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
        for name in self.encoders:
            items = [item for item in batch.media if item.modality == name]
            if not items:
                continue
            encoded = self.encode(name, [item.features for item in items])
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

    def hidden(self, batch: Batch, cache: Cache | None = None, rotations: Rotations | None = None) -> Tensor:
        """Return the decoder's final states, (batch, time, width), of whole rows from their first token on.

        rotations: a rotary table for each row in place of the config's.
        """
        step = self._step(batch.lengths, batch.route, batch.lengths.tolist(), cache, rotations)
        states: Tensor = self.decoder(self.embed(batch), step)
        return states

    def _step(
        self,
        lengths: Tensor,
        route: Route,
        reach: Sequence[int],
        cache: Cache | None = None,
        rotations: Rotations | None = None,
        cut: Cut | None = None,
    ) -> Step:
        """Return the step of rows turned by the tables of these lengths, unless they bring their own."""
        rope = self.config.decoder.rope
        if rotations is None and isinstance(rope, DynamicNtk):
            rotations = tables(rope, self.config.decoder.head_dim, reach, lengths.device)
        long = torch.tensor(is_long(rope, reach), device=lengths.device)
        return Step(lengths=lengths, route=route, long=long, cache=cache, rotations=rotations, cut=cut)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (batch, time, vocab). Raises ShapeError for what is no Batch."""
        if not isinstance(batch, Batch):
            raise ShapeError(f"the model takes a Batch, not {type(batch).__name__}; make one: processor([messages])")
        return self.decoder.head(self.hidden(batch))

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for this many rows."""
        return KVCache(self.config.decoder.num_hidden_layers, batch, self.device)

    def read(self, batch: Batch, cache: Cache, reach: Sequence[int] | None = None) -> Tensor:
        """Read whole prompts into an empty cache; return logits of each row's last token, (batch, vocab).

        reach: the length of each row that decides its rotary table; None: the row's own.
        """
        step = self._step(batch.lengths, batch.route, reach or batch.lengths.tolist(), cache)
        with wide_products() if batch.input_ids.numel() >= FEW else nullcontext():
            states: Tensor = self.decoder(self.embed(batch), step)
            rows = torch.arange(len(states), device=states.device)
            return self.decoder.head(states[rows, batch.lengths - 1])

    def read_next(self, ids: Tensor, route: Route, cache: Cache, reach: Sequence[int] | None = None) -> Tensor:
        """Read one more token per row, ids (batch,); return logits, (batch, vocab). reach: as for `read`."""
        lengths = reach or [length + 1 for length in cache.counts]
        step = self._step(torch.ones_like(ids), route, lengths, cache)
        return self.decoder.head(self.decoder(self.decoder.embed(ids[:, None]), step))[:, 0]

    def table_number(self, length: int) -> int:
        """Return which of the model's rotary tables a row of this length uses."""
        return table_number(self.config.decoder.rope, length)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the next-token losses of the labelled tokens and the row that each belongs to, both (labelled,).

        The rows lie end to end in one sequence, those of one adapter together and among these those of one length,
        which attention takes as one: nothing is computed for padding.
        Only labelled positions go through the output projection, which makes no logits. Where processes share the
        tokens, each returns the losses of its own: a label is the token behind, whoever holds that.
        """
        if batch.labels is None:
            raise ShapeError("loss needs labels: collate rows that Processor.row(messages, answer=False) returns")
        targets = batch.labels[:, 1:]
        rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
        states, starts, places = self._end_to_end(batch)
        at, here = _found(places, starts[rows] + columns)
        return self.decoder.losses(states[at], targets[rows, columns][here]), rows[here]

    def idle_rows(self, batch: Batch) -> list[int]:
        """Return the rows whose loss trains nothing: without adapter, without media that learn, on a frozen decoder."""
        if any(part_of(name) == "decoder" and own.requires_grad for name, own in self.decoder.named_parameters()):
            return []
        learning = {item.row for item in batch.media if self._learns(item)}
        return [row for row, own in enumerate(batch.route.adapters) if own is None and row not in learning]

    def _learns(self, item: Media) -> bool:
        networks = (self.encoders[item.modality], self.projectors.get_submodule(f"{item.modality}.{item.branch}"))
        return any(own.requires_grad for network in networks for own in network.parameters())

    def _end_to_end(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the final states of all real tokens, (tokens, width), where each row starts, (batch,), and the place
        of each token here, (tokens,), if some are elsewhere: those have none, NOWHERE.

        A last row of a few tokens that nobody reads makes the number of tokens even for products.
        """
        lengths, device = batch.lengths.tolist(), batch.input_ids.device
        order = sorted(range(len(lengths)), key=lambda row: (str(batch.route.adapters[row]), lengths[row]))
        spans, adapters = [lengths[row] for row in order], [batch.route.adapters[row] for row in order]
        ids = [batch.input_ids[row, : lengths[row]] for row in order]
        starts = torch.zeros(len(lengths), dtype=torch.long, device=device)
        starts[order] = torch.tensor((0, *spans[:-1]), device=device).cumsum(0)
        if filler := -sum(spans) % (EVEN * (self.cut.pieces if self.cut else 1)):
            ids.append(ids[0].new_zeros(filler))
            spans.append(filler)
            adapters.append(None)
        sequence, places, held = torch.cat(ids), None, None
        if self.cut:
            held = self.cut.held(len(sequence))
            places = _places(held, len(sequence)).to(device)
            sequence = torch.cat([sequence[piece.start : piece.stop] for piece in held])
        hidden = self.decoder.embed(sequence[None])
        if batch.media:
            features, rows, columns = self._features(batch)
            at, here = _found(places, starts[rows] + columns)
            hidden = hidden.index_put((torch.zeros_like(at), at), features.to(hidden.dtype)[here])
        route = Route(tuple(adapters), tuple(spans), held)
        step = self._step(torch.tensor(spans, device=device), route, spans, cut=self.cut)
        return self.decoder(hidden, step)[0], starts, places


def _places(held: Sequence[range], tokens: int) -> Tensor:
    """Return where each token of a sequence lies here, NOWHERE for those that are not, (tokens,)."""
    places = torch.full((tokens,), NOWHERE)
    at = 0
    for piece in held:
        places[piece.start : piece.stop] = torch.arange(at, at + len(piece))
        at += len(piece)
    return places


def _found(places: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor | slice]:
    """Return the places of those tokens that are here, and which these are."""
    if places is None:
        return tokens, slice(None)
    at = places[tokens]
    here = (at != NOWHERE).nonzero().squeeze(1)  # looked up once, and known where nothing else has numbers (plan)
    return at[here], here


def _shown(told: object) -> str:
    """Return in words what an encoder gave."""
    if isinstance(told, Tensor):
        return f"{told.dtype} {list(told.shape)}"
    held = f" [{listed([_shown(one) for one in told], 2, ', ')}]" if isinstance(told, list | tuple) else ""
    return f"a {type(told).__name__}{held}"


def make_encoder(modality: str, sizes: EncoderConfig) -> nn.Module:
    """Return a modality's encoder. Raises ConfigError where the code that brings it fails."""
    if modality in MODALITIES:
        return sizes.encoder()
    try:
        encoder = sizes.encoder()
    except ModaloraError:
        raise
    except Exception as error:  # it is someone else's code
        raise ConfigError(
            f"the modality {modality!r} makes no encoder of {sizes!s:.80}: encoder() fails with "
            f"{type(error).__name__}: {' '.join(str(error).split()):.200}; mend it, or change the sizes"
        ) from error
    if not isinstance(encoder, nn.Module):
        raise ConfigError(
            f"the modality {modality!r}: encoder() returns a {type(encoder).__name__}; return a torch.nn.Module"
        )
    if twofold := [name for name, tensor in encoder.state_dict().items() if tensor.is_complex()]:
        raise ConfigError(
            f"the modality {modality!r}: its encoder has complex numbers in {twofold[0]}, which no model folder holds; "
            "keep torch.view_as_real of them"
        )
    return encoder


def start_training(model: Multimodal) -> None:
    """Run as in training what trains; encoders and projectors of which nothing trains run as when they are read."""
    model.train()
    projectors = [one for own in model.projectors.children() for one in own.children()]
    for network in (*model.encoders.children(), *projectors):
        if not any(parameter.requires_grad for parameter in network.parameters()):
            network.eval()


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


def matches(part: str, *patterns: str) -> bool:
    """Tell whether a name of `part_of` is meant by one of the patterns, in which * stands for any text."""
    return any(fnmatchcase(part, pattern) for pattern in patterns)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return the numbers stored per part, buffers of the state dict included."""
    counts: dict[str, int] = defaultdict(int)
    for name, tensor in model.state_dict().items():
        counts[part_of(name)] += tensor.numel()
    return dict(counts)


LAYERS = (DecoderLayer, VisionLayer, ConformerBlock)


def recompute(model: nn.Module, *, offload: bool = False) -> None:
    """Let each decoder layer and encoder block of a model run again instead of keeping what it computes.

    offload: keep its input in the memory of the CPU meanwhile.
    """
    general.recompute(model, LAYERS, offload=offload)
