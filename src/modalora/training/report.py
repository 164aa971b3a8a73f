"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw every "loss" column of a metrics.jsonl against its step into a PNG."""
    from matplotlib.figure import Figure  # only runs that end need it

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key in sorted({key for line in lines for key in line if key.startswith("loss")}):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points, strict=True), label=key, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats)", title=str(picture.parent))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
