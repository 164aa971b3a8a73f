"""Train a recipe with Ray Train: Ray places the processes, modalora does the rest.

    RAY_AUTH_MODE=token python examples/launch/ray_train.py RECIPE --workers 4 --gpu [key=value ...]

The output folder must lie on a file system that all workers see. Needs `pip install 'ray[train]'`. Ray's ports take
commands from whoever reaches them, so this script does not start without Ray's token authentication.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def work(given: dict[str, Any]) -> None:
    """Carry out the recipe in one worker, for which Ray has set RANK, WORLD_SIZE and the process group."""
    from modalora.config import load_run
    from modalora.training.run import run_recipe

    def show(metrics: dict[str, Any]) -> None:
        print(f"step {metrics['step']}  loss {metrics['loss']:.3f}", flush=True)

    run_recipe(load_run(given["recipe"], given["overrides"]), show)


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description="Train a recipe with Ray Train.")
    parser.add_argument("recipe", help="a YAML file, or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", help="settings to change, e.g. steps=100")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU per worker")
    given = parser.parse_args()
    if os.environ.get("RAY_AUTH_MODE") != "token":
        parser.error(
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN: without them anyone who reaches a port of Ray runs code on it"
        )

    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = str(Path(given.recipe).resolve()) if Path(given.recipe).is_file() else given.recipe
    overrides = [*given.overrides, f"device={'cuda' if given.gpu else 'cpu'}"]
    TorchTrainer(
        work,
        train_loop_config={"recipe": recipe, "overrides": overrides},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if given.gpu else "gloo"),
    ).fit()


if __name__ == "__main__":
    main()
