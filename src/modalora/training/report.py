"""What a run tells people: what trains, and its curves as a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from modalora.models.multimodal import part_of
from modalora.training.objectives import trained_part
from modalora.training.optimizer import Optimizer

# panel: columns of metrics.jsonl, by pattern
_PANELS = {
    "loss (nats)": ("loss", "loss_*", "eval_loss", "eval_loss/*"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm", "grad_norm_*"),
    "per second": ("tokens_per_second", "labels_per_second"),
}


def what_trains(model: nn.Module, trained: Mapping[str, nn.Parameter], optimizer: Optimizer) -> list[str]:
    """Return a table, line by line: each part with its numbers, how many train, their share and their peak rate."""
    sizes: dict[str, int] = defaultdict(int)
    learn: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    for name, parameter in trained.items():
        part = trained_part(name)
        learn[part] += parameter.numel()
        if part == "objective":  # not of the model
            sizes[part] += parameter.numel()
    whole = sum(sizes.values())
    lines = [f"{'part':<26}{'numbers':>15}{'train':>15}{'share':>9}  rate"]
    for part, size in sizes.items():
        rate = f"{optimizer.peak(part):.3g}" if learn[part] else "frozen"
        lines.append(f"{part:<26}{size:>15,}{learn[part]:>15,}{learn[part] / whole:>9.2%}  {rate}")
    total = sum(learn.values())
    lines.append(f"{'all':<26}{whole:>15,}{total:>15,}{total / whole:>9.2%}")
    return lines


def plot_metrics(metrics: Path, picture: Path) -> bool:
    """Draw the losses, the rate, the gradient norms and the speed of a metrics.jsonl into a PNG.

    Return whether there is one: without matplotlib, an extra, there is none.
    """
    try:
        from matplotlib.figure import Figure  # only runs that end need it
    except ModuleNotFoundError:
        return False
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, (title, patterns) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        keys = sorted({key for line in lines for key in line if any(fnmatchcase(key, own) for own in patterns)})
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), label=key, linewidth=1)
        axes.set(xlabel="step", ylabel=title)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend()
    figure.suptitle(str(picture.parent))
    figure.savefig(picture, dpi=120)
    return True
