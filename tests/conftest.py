"""What every test gets: annotations checked while it runs, one thread, and the real data where it is at hand."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception
from jaxtyping import install_import_hook

# Calls in these rooms are checked against their annotations, in tests only. Left out are the rooms that users hand
# things to (processing, assistant, cli), whose own messages about wrong types are tested, and data, whose loops over
# millions of small calls would take five times as long.
CHECKED = ("contracts", "disk", "models", "science", "generation", "checkpoint", "training", "evaluation", "longrope2")
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for is right


def checked(function: Any) -> Any:
    """Return the function with its annotations checked; with a Protocol that isinstance does not take, as it is."""
    try:
        return _checked(function)
    except BeartypeDecorHintPep3119Exception:
        return function


NN = Path(__file__).parents[1] / "src" / "modalora" / "nn"
# Triton reads the source of what it compiles: its kernels are left alone
FILES = [f"nn.{path.stem}" for path in sorted(NN.glob("[a-z]*.py")) if path.stem != "fused"]
install_import_hook([f"modalora.{name}" for name in (*CHECKED, *FILES)], f"{__name__}.checked")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on a CPU

DATA = Path(os.environ.get("MODALORA_DATA") or Path(__file__).parents[2] / "shared" / "data")
ABSENT = f"no real data at {DATA}: set MODALORA_DATA to the folder that docs/nano.md describes"

torch.set_num_threads(1)  # the models here are so small that a second thread costs more than it gives


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("data") and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=ABSENT))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets. Mark a test that takes it with `data`."""
    if not DATA.is_dir():
        pytest.skip(ABSENT)
    return DATA


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; return exit code, stdout and stderr."""
    from modalora.cli.main import main  # once annotations are checked

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["modalora", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


# Several processes on this machine, forked from the test and bounded in time: none outlives it.
# far above what anything here takes on an idle machine, far below patience: a hang fails
SECONDS = float(os.environ.get("MODALORA_TEST_SECONDS", "60"))


def _work(rank: int, world: int, store: Path, answers: Any, function: Callable[..., Any], arguments: Any) -> None:
    from modalora.parallel.stops import LOOPBACK

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME=LOOPBACK)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        answers.send_bytes(pickle.dumps((True, function(*arguments))))  # tensors by value
        dist.destroy_process_group()
    except BaseException:
        answers.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        answers.close()
        os._exit(0)  # what pytest registered to run at exit is the parent's


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """ranks(world, function, *arguments): what the function returned in each of so many processes."""
    count = 0

    def run(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        nonlocal count
        count += 1
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        workers = [
            context.Process(
                target=_work, args=(rank, world, tmp_path / f"store-{count}", pipes[rank][1], function, arguments)
            )
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        for _, sender in pipes:
            sender.close()
        deadline = time.monotonic() + seconds
        answers = []
        try:
            for rank, (receiver, _) in enumerate(pipes):
                assert receiver.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} hangs"
                fine, answer = pickle.loads(receiver.recv_bytes())
                assert fine, f"rank {rank}: {answer}"
                answers.append(answer)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        return answers

    return run
