"""Metrics sent on to TensorBoard, Trackio or Weights & Biases, as a run asks for; none is on by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from modalora.config import RunConfig
from modalora.errors import ConfigError

Track = Callable[[Mapping[str, Any]], None]


def open_trackers(run: RunConfig, stack: ExitStack) -> list[Track]:
    """Return a function per tracker that takes the metrics of a logged step; all are closed with the stack.

    Raises ConfigError naming the command that installs a tracker which is missing.
    """
    return [_OPEN[name](run, stack) for name in run.trackers]


def _load(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"trackers: {package} is not installed ({error}); pip install {package}, or leave it out of trackers:"
        ) from None


def _tensorboard(run: RunConfig, stack: ExitStack) -> Track:
    _load("tensorboard", "tensorboard")
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(Path(run.output) / "tensorboard"))
    stack.callback(writer.close)

    def track(metrics: Mapping[str, Any]) -> None:
        for name, value in _figures(metrics).items():
            writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return track


def _hosted(package: str) -> Callable[[RunConfig, ExitStack], Track]:
    def open_one(run: RunConfig, stack: ExitStack) -> Track:
        library = _load(package, package)
        library.init(project="modalora", name=Path(run.output).name, config=run.model_dump(mode="json"))
        stack.callback(library.finish)
        return lambda metrics: library.log(_figures(metrics), step=metrics["step"])

    return open_one


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in ("step", "steps")}


_OPEN: dict[str, Callable[[RunConfig, ExitStack], Track]] = {
    "tensorboard": _tensorboard,
    "trackio": _hosted("trackio"),
    "wandb": _hosted("wandb"),
}
