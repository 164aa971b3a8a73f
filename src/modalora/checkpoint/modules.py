"""Whole modules in an adapter's folder (PEFT's modules_to_save), and where rows can be routed to them.

A modality that the model lacks comes along: modality.json tells its package and sizes. A projector of a modality that
the model has becomes a projector beside the old one, for the rows of this adapter alone. Anything else (an output
matrix, embeddings, norms, an encoder that other rows use) would change rows of other routes, and is refused unless it
holds what the model holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modalora.checkpoint.files import Weights, fitted, inside
from modalora.checkpoint.names import plain_name, plan, theirs
from modalora.disk import CONFIG_BYTES, read_json
from modalora.errors import CheckpointError
from modalora.modality import brought_by, find, read_encoders, write_encoders
from modalora.models.multimodal import EncoderConfig, Multimodal, make_encoder
from modalora.nn.mlp import Projector

MODALITY = "modality.json"
PREFIX = "base_model.model."
_WRAPPED = re.compile(r"\.modules_to_save\.[\w-]+(?=\.)")  # PEFT's name in memory, which some writers leave in the file
_PUBLISHED = "phi4_multimodal"  # the layout that PEFT trains; our own names for all that it lacks


@dataclass(frozen=True)
class Modules:
    """What a folder brings besides LoRA matrices, checked.

    modalities: sizes of those to add. branches: (modality, branch that is stood in for). stored: key in the file by our
    tensor name, as it is without an adapter's own branch. unknown: keys that are no tensor of the model.
    """

    modalities: Mapping[str, EncoderConfig]
    branches: tuple[tuple[str, str], ...]
    stored: Mapping[str, str]
    unknown: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The modules, for people."""
        return (*self.modalities, *(f"{modality}.projector.{branch}" for modality, branch in self.branches))


def find_modules(
    model: Multimodal, folder: Path, weights: Weights, keys: list[str], wanted: Any, where: Path
) -> Modules:
    """Return the modules among the keys that are no LoRA matrices. Raises CheckpointError for what cannot be routed.

    wanted: the folder's modules_to_save.
    """
    brought = _read_modalities(folder)
    new = {name: sizes for name, sizes in brought.items() if name not in model.encoders}
    held = dict(model.state_dict())
    for name, sizes in brought.items():
        if name in model.encoders and sizes != model.config.modalities[name]:
            raise CheckpointError(
                f"{folder} brings the modality {name!r} with {sizes}, and this model has it with "
                f"{model.config.modalities[name]}; load it on a model without {name}"
            )
    own_parts = _tensors(model, new)
    needed = held | own_parts
    ours = theirs(needed)
    if model.decoder.lm_head is None:
        ours["lm_head.weight"] = "decoder.embed_tokens.weight"
    plain = {key: _WRAPPED.sub("", plain_name(key)) for key in keys}
    stored, unknown = _places({key: ours.get(name) for key, name in plain.items()}, weights)
    if wanted is not None and not (isinstance(wanted, list) and all(isinstance(one, str) for one in wanted)):
        raise CheckpointError(f"{where} has modules_to_save={wanted!r:.60}; it must be a list of module names")
    absent = [one for one in wanted or () if not any(f".{one}." in f".{name}." for name in plain.values())]
    if absent:
        raise CheckpointError(f"{where} has modules_to_save={absent}, of which {folder} holds no tensor")
    missing = sorted(set(own_parts) - set(stored))
    if missing and not unknown:
        raise CheckpointError(f"{folder}: {len(missing)} tensors of its modality are missing, such as {missing[0]}")
    for name, key in stored.items():
        _check_fit(weights, key, needed[name])
    branches: dict[tuple[str, str], None] = {}
    for name, key in list(stored.items()):
        pieces = name.split(".")
        if pieces[1] in new:
            continue
        if pieces[0] == "projectors":
            branches[pieces[1], pieces[2]] = None
        elif torch.equal(weights.get(key).to(held[name]), held[name]):
            del stored[name]
        else:
            raise CheckpointError(f"{folder} saves {key}: {_reason(pieces)}; merge it with PEFT, or train without")
    return Modules(new, tuple(branches), stored, tuple(unknown))


def _places(named: Mapping[str, str | None], weights: Weights) -> tuple[dict[str, str], list[str]]:
    """Return keys by our name of what they hold, and those that are no tensor of ours, or one for the second time."""
    stored: dict[str, str] = {}
    unknown: list[str] = []
    for key, own in named.items():
        if own is not None and own in stored and torch.equal(weights.get(key), weights.get(stored[own])):
            continue  # an output matrix that is tied, saved again beside the embedding
        if own is None or own in stored:
            unknown.append(key)
        else:
            stored[own] = key
    return stored, unknown


def _check_fit(weights: Weights, key: str, needed: Tensor) -> None:
    shape, kind = weights.entries[key].shape, weights.get(key).dtype
    if shape != needed.shape:
        raise CheckpointError(
            f"{weights.folder}: {key} has shape {list(shape)}, and this model needs {list(needed.shape)}: it was "
            "trained on another base model"
        )
    if kind != needed.dtype and not (kind.is_floating_point and needed.is_floating_point()):
        raise CheckpointError(
            f"{weights.folder}: {key} has dtype {weights.entries[key].dtype}, and this model has {needed.dtype} "
            "there; floats are cast, other numbers are not: save it in that dtype"
        )


def ready_modules(
    model: Multimodal, modules: Modules, weights: Weights, *, as_stored: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of what `find_modules` found, by our names, in the dtype that the model runs in.

    as_stored: in the files' dtype. Raises CheckpointError for numbers that are not finite.
    """
    held, ready = model.state_dict(), {}
    for name, key in modules.stored.items():
        tensor, what = weights.get(key), f"{weights.folder}: {key}"
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{what} holds numbers that are not finite; its training went wrong, train it anew or take an earlier "
                "state"
            )
        dtype = held.get(name, model.decoder.embed_tokens.weight).dtype
        ready[name] = tensor if as_stored or not tensor.is_floating_point() else fitted(tensor, dtype, what)
    return ready


def add_modules(model: Multimodal, modules: Modules, tensors: Mapping[str, Tensor], adapter: str) -> None:
    """Add what `find_modules` found, for the rows of an adapter; tensors: what `ready_modules` made of it."""
    for name, sizes in modules.modalities.items():
        model.add_modality(name, sizes)
        routed = find(name).routes[frozenset({name})].adapter
        if routed not in (None, adapter):
            model.config = replace(model.config, aliases={**model.config.aliases, routed: adapter})
    for modality, branch in modules.branches:
        old = model.projectors.get_submodule(f"{modality}.{branch}")
        # what the folder leaves out stays as it is in the old one
        model.add_branch(modality, f"{branch}-{adapter}").load_state_dict(old.state_dict())
    held, found = model.state_dict(), {}
    for name, tensor in tensors.items():
        pieces = name.split(".")
        if tuple(pieces[1:3]) in modules.branches:
            pieces[2] = f"{pieces[2]}-{adapter}"
        place = ".".join(pieces)
        found[place] = tensor.to(held[place].device)
    model.load_state_dict(found, strict=False, assign=True)


def modules_of(model: Multimodal, adapter: str) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """Return the tensors that belong to an adapter besides its matrices, by PEFT's keys; their modules_to_save; and
    what modality.json holds.
    """
    brought = brought_by(model.config, adapter)
    sizes = model.config.modalities
    tensors: dict[str, Tensor] = {}
    modules = [f"{kind}.{name}" for name in brought for kind in ("encoders", "projectors")]
    for name, tensor in model.state_dict().items():
        kind, modality, *rest = name.split(".")
        if kind == "decoder":
            continue
        base = rest[0].removesuffix(f"-{adapter}")
        if modality in brought and (kind == "encoders" or rest[0] in sizes[modality].branches):
            tensors[PREFIX + name] = tensor
        elif kind == "projectors" and base != rest[0] and base in sizes[modality].branches:
            plain = ".".join((kind, modality, base, *rest[1:]))
            if modality in ("image", "audio"):
                plain = plan(_PUBLISHED, {plain: tuple(tensor.shape)}, model.config)[plain].name
            tensors[PREFIX + plain] = tensor
            module = plain.rpartition(".")[0]
            module = module.rpartition(".")[2] if modality in ("image", "audio") else module
            modules += [module] if module not in modules else []
    encoders = write_encoders(model.config)
    return tensors, modules, {name: encoders[name] for name in brought}


def own_projectors(model: Multimodal, adapter: str) -> list[str]:
    """Return the modalities for which an adapter brought projectors of its own."""
    held = {
        name: (sizes.branches, model.config.branches.get(name, ())) for name, sizes in model.config.modalities.items()
    }
    return [name for name, (plain, own) in held.items() if any(f"{one}-{adapter}" in own for one in plain)]


def _read_modalities(folder: Path) -> dict[str, EncoderConfig]:
    path = inside(folder, MODALITY)
    return read_encoders(read_json(path, most=CONFIG_BYTES), str(path)) if path.exists() else {}


def _tensors(model: Multimodal, modalities: Mapping[str, EncoderConfig]) -> dict[str, Tensor]:
    """Return the tensors that modalities will have once they are added, without memory."""
    width = model.config.decoder.hidden_size
    with torch.device("meta"):
        parts = {
            f"{kind}.{name}": module
            for name, sizes in modalities.items()
            for kind, module in (
                ("encoders", make_encoder(name, sizes)),
                ("projectors", nn.ModuleDict({one: Projector(sizes.hidden_size, width) for one in sizes.branches})),
            )
        }
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def _reason(pieces: list[str]) -> str:
    if pieces[0] == "encoders":
        return f"the encoder of {pieces[1]!r} serves rows of every route, and this one differs from it"
    return f"{'.'.join(pieces[1:])} is the decoder's, it serves rows of every route, and this one differs from it"
