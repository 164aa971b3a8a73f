"""Starting processes and telling them how to work together.

On one machine `launch` runs torchrun's own agent: it watches the processes, ends all when one dies, and passes signals
on. Processes then find each other through a file and talk over loopback: nothing listens to the network. Over several
machines, torchrun itself is started on each (examples/launch/), with the addresses that it is given.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from modalora.config import RunConfig
from modalora.errors import ConfigError, TrainingError
from modalora.parallel.engine import Engine, Single
from modalora.parallel.ranks import NOTHING_TO_OFFLOAD, join
from modalora.parallel.stops import LOOPBACK, STORE, is_one_of_many, told

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

GRACE_SECONDS = 600  # to save in after a signal


def engine_for(run: RunConfig) -> Engine:
    """Return what carries out a run: this process alone, or with those that a launcher started beside it.

    Raises ConfigError for a mesh that does not fit, or settings that the engine does not have.
    """
    if not is_one_of_many():
        _check_alone(run)
        return Single()
    check_processes(run, int(os.environ["WORLD_SIZE"]))
    device = join(run.device, run.patience_seconds)
    if run.engine == "fsdp":
        from modalora.parallel.fsdp import Plan, Sharded

        plan = Plan(bf16=run.precision == "bf16", offload=run.offload)
        return Sharded(run.mesh, plan, device)
    from modalora.parallel.zero import Zero

    stage = cast(Literal[1, 2, 3], int(run.engine[-1]))
    return Zero(stage, device, offload=run.offload, clip_norm=run.optim.clip_norm, mesh=run.mesh)


def _check_alone(run: RunConfig) -> None:
    if run.mesh.replicate * max(1, run.mesh.shard) * run.mesh.copies > 1:
        raise ConfigError(f"mesh: {run.mesh} needs several processes; start them with --gpus N or --processes N")
    if run.offload or run.engine != "fsdp":
        named = f"engine={run.engine}" if run.engine != "fsdp" else "offload=true"
        raise ConfigError(f"{named} is for several processes, and this is one; start them with --gpus N, or drop it")


def check_processes(run: RunConfig, count: int) -> None:
    """Refuse what so many processes cannot do, before any is started. Raises ConfigError."""
    if run.base_bits is not None or run.optim.state_bits != 32:
        raise ConfigError("base_bits and optim.state_bits save memory in one process; many share plain numbers instead")
    if run.engine == "fsdp":
        from modalora.parallel.fsdp import sizes

        sizes(run.mesh, count)
        if run.offload and torch.device(run.device).type == "cpu":
            raise ConfigError(NOTHING_TO_OFFLOAD)
        return
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"engine={run.engine} needs DeepSpeed; pip install -e '.[deepspeed]' in your clone, or use engine=fsdp"
        )
    if run.mesh.replicate * run.mesh.tensor > 1:
        raise ConfigError(
            f"mesh: engine={run.engine} cuts over all processes alike, and takes mesh.sequence alone; use engine=fsdp "
            "for other meshes"
        )
    if run.nonfinite == "skip":
        raise ConfigError(f"nonfinite=skip: engine={run.engine} cannot drop a step; use engine=fsdp, or stop")


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `modalora ARGUMENTS` in so many processes on this machine; return the exit code.

    That is 0 when all ended well, 130 (Ctrl-C) or 0 (SIGTERM) when they were stopped and have saved. Raises
    TrainingError naming the process that failed first.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="modalora-") as name:
        folder = Path(name)
        given = {
            STORE: str(folder / "store"),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK),
            "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", LOOPBACK),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # it would listen on every address
        }
        os.environ.update(given)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="modalora",
            rdzv_backend="c10d",
            rdzv_endpoint=str(folder / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            max_restarts=0,
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
            shutdown_timeout=GRACE_SECONDS,
        )
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):  # processes say why they fail, _explain who was killed
                logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            elastic_launch(config, sys.executable)("-m", "modalora.cli.main", *arguments)
        except SignalException as stopped:
            if any(told(folder / "store", rank) == "training" for rank in range(processes)):
                raise TrainingError("stopped before all processes had saved; the state saved last is whole") from None
            return 128 + signal.SIGINT if stopped.sigval == signal.SIGINT else 0
        except ChildFailedError as failed:
            return _explain(failed)
    return 0


def _explain(failed: ChildFailedError) -> int:
    """Return the exit code of the process that failed first. Raises TrainingError when a signal ended it."""
    # one that was killed is the cause of what the others then met; but by SIGTERM the agent ends those behind the first
    told_to = -signal.SIGTERM
    rank, first = min(
        failed.failures.items(), key=lambda one: (one[1].exitcode == told_to, one[1].exitcode >= 0, one[1].timestamp)
    )
    if first.exitcode < 0:
        raise TrainingError(
            f"process {rank} was ended by {first.signal_name()} (out of memory?), and the others with it; the same "
            "command goes on from the state saved last"
        )
    return int(first.exitcode)
