"""Several processes on this machine, forked from the test and bounded in time: none outlives it."""

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

sys.path.insert(0, str(Path(__file__).parent))  # for rows.py

# far above what anything here takes on an idle machine, far below patience: a hang fails
SECONDS = float(os.environ.get("MODALORA_TEST_SECONDS", "60"))


def _work(rank: int, world: int, store: Path, answers: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
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
