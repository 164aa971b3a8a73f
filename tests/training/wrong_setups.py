"""Set-ups of public bug reports that trained nothing, or the wrong thing, for hours; each must end within 4 steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from toys import Steps, fresh, mixed, settings, text

from modalora.checkpoint.adapters import load_adapter, save_adapter
from modalora.checkpoint.write import save_model
from modalora.config import load_run
from modalora.contracts import IGNORED, Batch
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.parallel.engine import Single
from modalora.training.loop import train
from modalora.training.run import run_recipe
from small import fox


@dataclass(frozen=True)
class Wrong:
    """A wrong set-up: what trains into a folder and must fail, and what the message must say."""

    work: Callable[[Path, Steps], Any]
    told: str


class Shard(Single):
    """An engine that spoils the model where others wrap it."""

    def __init__(self, spoil: Callable[[Multimodal], None]) -> None:
        self.spoil = spoil

    def shard(self, model: Multimodal, objective: torch.nn.Module) -> None:
        super().shard(model, objective)
        self.spoil(model)


def frozen_adapter(folder: Path, data: Steps) -> None:
    """trl #3926: a PEFT model is passed in with its adapter frozen, and stays so."""

    def freeze(model: Multimodal) -> None:
        for name, own in model.named_parameters():
            own.requires_grad_("lora_" not in name and own.requires_grad)

    train(settings(folder, "adapter.vision", steps=8), fresh(), data, engine=Shard(freeze))


def only_layer_0(folder: Path, data: Steps) -> None:
    """torchforge #592: under FSDP only the first layer's LoRA got gradients."""

    def cut(model: Multimodal) -> None:
        for name, own in model.named_parameters():
            if "layers.1." in name and "lora_" in name and own.requires_grad:
                own.register_hook(torch.zeros_like)

    train(settings(folder, "adapter.vision", steps=8), fresh(), data, engine=Shard(cut))


def masked_labels(folder: Path, data: Steps) -> None:
    """A chat template that marks no assistant turn masks every label; the loss is 0 or NaN and nothing is learnt."""

    def mask(step: int) -> list[Batch]:
        batch = mixed(step)
        assert batch.labels is not None
        return [replace(batch, labels=torch.full_like(batch.labels, IGNORED))]

    data.make = mask
    train(settings(folder, "adapter.vision", steps=8), fresh(), data)


def wrong_placeholders(folder: Path, data: Steps) -> None:
    """LLaMA-Factory #5964, ms-swift #2460: image features and image tokens do not match."""

    def one_more(step: int) -> list[Batch]:
        batch = mixed(step)
        return [replace(batch, media=tuple(replace(item, tokens=item.tokens + 1) for item in batch.media))]

    data.make = one_more
    train(settings(folder, "adapter.vision", steps=8), fresh(), data)


def cut_media(folder: Path, data: Steps) -> None:
    """LLaMA-Factory #9166: a length limit slices through a media span."""

    def cut(step: int) -> list[Batch]:
        batch = mixed(step)
        return [replace(batch, lengths=batch.lengths.clamp(max=12))]

    data.make = cut
    train(settings(folder, "adapter.vision", steps=8), fresh(), data)


def other_base(folder: Path, data: Steps) -> None:
    """An adapter of one base model goes on training on another of the same shapes."""
    one, other = fresh(), Multimodal(tiny())
    for own in one.parameters():
        torch.nn.init.normal_(own, std=0.1)
    save_adapter(one, "vision", folder / "lora")
    load_adapter(other, folder / "lora", "mine")
    train(settings(folder / "run", "adapter.mine", steps=8), other, data)


def other_base_by_recipe(folder: Path, data: Steps) -> None:
    """The same through `take:` of a recipe."""
    tokenizer = fox()
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        save_model(Multimodal(tiny()), tokenizer, folder / name)
    run = settings(folder / "run", "adapter.vision", init=str(folder / "two"), steps=8)
    run_recipe(run.model_copy(update={"take": {"adapter.vision": str(folder / "one")}}))


def matches_nothing(folder: Path, data: Steps) -> None:
    """target_modules or parts that name nothing: unsloth #2142 and many more."""
    train(settings(folder, "adapter.visoin", steps=8), fresh(), data)


def rate_of_zero(folder: Path, data: Steps) -> None:
    """A rate of 0, given or by a factor."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "{init: tiny, output: out, train: [decoder], mixture: [{source: books}], steps: 8, "
        "optim: {warmup_steps: 0, lr_scale: {decoder: 0}}}"
    )
    train(load_run(recipe, [f"output={folder}"]), fresh(), data)


def warm_up_without_end(folder: Path, data: Steps) -> None:
    """A warm-up that is longer than the run never reaches the rate."""
    run = settings(folder, "adapter.vision", steps=8)
    train(run.model_copy(update={"optim": run.optim.model_copy(update={"warmup_steps": 100})}), fresh(), data)


def never_routed(folder: Path, data: Steps) -> None:
    """ms-swift #5811: a LoRA is trained beside the built-in ones, and no row ever uses it."""
    data.make = lambda step: [text(step)]
    train(settings(folder, "adapter.vision", steps=8), fresh(), data)


def too_wide(folder: Path, data: Steps) -> None:
    """A fork of the official sample trained everything but the LoRA that it was about."""
    train(settings(folder, "*", steps=8, preserve=["decoder"]), fresh(), data)


WRONG: Mapping[str, Wrong] = {
    "frozen adapter passed in (trl #3926)": Wrong(frozen_adapter, r"adapter.vision was declared to train.*froze it"),
    "labels all masked": Wrong(masked_labels, "step 1 has no labelled token"),
    "wrong placeholder count (ms-swift #2460)": Wrong(
        wrong_placeholders, "step 1, .*13 features for 14 placeholder tokens"
    ),
    "media cut off (LLaMA-Factory #9166)": Wrong(cut_media, r"row 1 of micro-batch 0: its image fills tokens 1 to 14"),
    "adapter for another base": Wrong(other_base, "was trained on another base model"),
    "adapter for another base, by a recipe": Wrong(other_base_by_recipe, "was trained on another base model"),
    "patterns that match nothing": Wrong(matches_nothing, "matches no part"),
    "rate of 0": Wrong(rate_of_zero, "'decoder' learns at a rate of 0"),
    "warm-up longer than the run": Wrong(warm_up_without_end, "warmup_steps=100 is not shorter than the run"),
    "adapter on rows never routed to it (ms-swift #5811)": Wrong(
        never_routed,
        r"no labelled row of the first 4 steps reached anything that trains \(adapter.vision\); rows reached decoder",
    ),
    "decoder trained along with the adapter": Wrong(too_wide, "'decoder' is to stay as it is"),
    "only layer 0 gets LoRA gradients (torchforge #592)": Wrong(
        only_layer_0, r"adapter.vision trains, and 8 of its 16 tensors got no gradient .*layers.1."
    ),
}


def mixed_data() -> Steps:
    """Return rows of every kind."""
    return Steps(lambda step: [mixed(step)])
