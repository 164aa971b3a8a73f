"""Sums of adapters written down: as one adapter (compose), or into the decoder's own weights (merge)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot
from typing import Any

import torch
from torch import Tensor, nn

from modalora.checkpoint.adapter_config import shortest
from modalora.checkpoint.adapters import check_free, check_plain, linears_of
from modalora.checkpoint.files import fitted
from modalora.checkpoint.modules import own_projectors
from modalora.contracts import terms
from modalora.errors import CheckpointError, ConfigError
from modalora.models.multimodal import Multimodal
from modalora.nn.lora import LoraConfig


def compose(model: Multimodal, route: str, name: str) -> LoraConfig:
    """Add one adapter that is the weighted sum of several, exactly: their ranks side by side.

    route: "vision+mine@0.7". Raises RouteError for what is no sum of this model's adapters, CheckpointError for a name
    that is taken.
    """
    parts = _weighted(route)
    check_plain(model)
    held = {one: linears_of(model, one) for one, _ in parts}
    _needs_matrices_alone(model, [one for one, _ in parts])
    check_free(model, name)
    ranks = {one: max(linear.adapters[one].r for linear in linears.values()) for one, linears in held.items()}
    r = sum(ranks.values())
    routed = model.decoder.routed()
    places = [place for place in routed if any(place in linears for linears in held.values())]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=shortest(places, routed))
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for place in places:
            linear = routed[place]
            like: dict[str, Any] = {"dtype": _exact(linear.weight), "device": linear.weight.device}
            down = torch.zeros(r, linear.weight.shape[1], **like)
            up = torch.zeros(len(linear.weight), r, **like)
            at = 0
            for one, weight in parts:
                if one in linear.adapters:
                    rows = slice(at, at + linear.adapters[one].r)
                    down[rows] = linear.lora_A[one].to(down)
                    up[:, rows] = linear.lora_B[one].to(up) * (weight * linear.adapters[one].scaling)
                at += ranks[one]
            if not (down.isfinite().all() and up.isfinite().all()):
                raise CheckpointError(f"{route!r} makes {place} infinite; give smaller weights, such as 0.7")
            sums[place] = down, up
    model.decoder.add_adapter(name, config)
    for place, (down, up) in sums.items():  # in no fewer bits: rounding would change the sum
        routed[place].lora_A[name], routed[place].lora_B[name] = nn.Parameter(down), nn.Parameter(up)
    model.config = replace(model.config, adapters={**model.config.adapters, name: config})
    return config


@dataclass(frozen=True)
class Merged:
    """What a merge did. error: rounding of the merged weights over the change that they should have made (rms)."""

    linears: int
    error: float
    worst: str
    worst_error: float


@torch.no_grad()
def merge(model: Multimodal, route: str) -> Merged:
    """Add a sum of adapters to the decoder's own weights, in float32 or more and rounded once; remove every adapter.

    The others go because they were trained on the decoder as it was. Text then changes too: nothing is routed any more.
    """
    parts = _weighted(route)
    check_plain(model)
    if model.decoder.is_quantised:
        raise ConfigError("this model was quantised; merge into its plain weights")
    for one, _ in parts:
        linears_of(model, one)
    _needs_matrices_alone(model, [one for one, _ in parts])
    errors: dict[str, tuple[float, float]] = {}
    results: dict[str, Tensor] = {}
    routed = model.decoder.routed()
    for place, linear in routed.items():
        held = [(one, weight * linear.adapters[one].scaling) for one, weight in parts if one in linear.adapters]
        if not held:
            continue
        dtype = _exact(linear.weight)
        change = torch.zeros_like(linear.weight, dtype=dtype)
        for one, scaling in held:
            change += linear.lora_B[one].to(dtype) @ linear.lora_A[one].to(dtype) * scaling
        exact = linear.weight.to(dtype) + change
        if not change.isfinite().all():
            raise CheckpointError(f"{route!r} makes {place} infinite; give smaller weights, such as 0.7")
        if _size(change):
            results[place] = merged = fitted(exact, linear.weight.dtype, f"{place} with {route!r}")
            made = merged.to(dtype) - linear.weight.to(dtype)
            errors[place] = _size(made - change), _size(change)
    if not errors:
        raise CheckpointError(f"{route!r} changes no weight; there is nothing to merge")
    for place, result in results.items():  # once all of them are finite
        routed[place].weight = nn.Parameter(result)
    for linear in routed.values():
        for one in list(linear.adapters):
            linear.drop_adapter(one)
    model.config = replace(model.config, adapters={}, aliases={})
    lost, wanted = (hypot(*(pair[side] for pair in errors.values())) for side in (0, 1))
    worst = max(errors, key=lambda place: errors[place][0] / errors[place][1])
    return Merged(len(errors), lost / wanted, worst, errors[worst][0] / errors[worst][1])


def _size(change: Tensor) -> float:
    """Return the root of the sum of squares, in float64: float32 has no squares of what a weight of 1e-25 makes."""
    return float(torch.linalg.vector_norm(change, dtype=torch.float64))


def _exact(weight: Tensor) -> torch.dtype:
    """Return the dtype in which sums of matrices are made: float32, or float64 where the matrix has that."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _weighted(route: str) -> tuple[tuple[str, float], ...]:
    """Return the terms of a sum that is to be written down. Raises CheckpointError where all weights are zero."""
    parts = terms(route)
    if not any(weight for _, weight in parts):
        raise CheckpointError(f"{route!r} has no weight but zero, so it changes nothing; give one, such as 0.7")
    return parts


def _needs_matrices_alone(model: Multimodal, names: Sequence[str]) -> None:
    for one in names:
        if modalities := own_projectors(model, one):
            raise CheckpointError(
                f"the adapter {one!r} brings a projector of its own for {', '.join(modalities)}, which no sum "
                "of matrices holds; use it by its route"
            )
