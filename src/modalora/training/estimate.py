"""The time and memory that a machine needs for a planned step (training/plan.py), and for reading with a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modalora.config import RunConfig
from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal, parameter_counts
from modalora.training.machines import machine_of, machine_rate, measured_bandwidth, measured_rate, own_memory, resident
from modalora.training.plan import Plan, read_size


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time and memory of a run on a machine. memory: bytes of the fullest of the machines, process left out."""

    memory: int
    process: int
    capacity: float
    fits: bool | None  # None: unknown
    rate: float  # FLOP/s of all machines together
    step_seconds: float
    run_seconds: float
    price: float
    assumption: str


def estimate(plan: Plan, run: RunConfig, machine: str, count: int, share: float, hourly: float) -> Estimate:
    """Return what a planned run takes on `count` machines of a kind, "this" or a name of MACHINES.

    share: of a GPU's peak rate that a step reaches. This machine's rates are measured, and the time to move what
    operations read and write is added, as if no cache helped. Weights, gradients and optimiser are shared evenly as
    run.engine and run.mesh say, and the step itself, told by the rows of one process, is not. Raises ConfigError where
    so many machines cannot share what the run says.
    """
    if count % run.mesh.sequence:
        raise ConfigError(
            f"mesh.sequence={run.mesh.sequence} processes share the tokens of a row; plan for a multiple of so many, "
            f"--count {run.mesh.sequence}"
        )
    memory = plan.step + _states(plan, run, count)
    one = machine_rate(machine, run.precision, share)
    seconds = plan.flops / one  # every one of `count` computes rows of its own
    if machine == "this":
        bandwidth = measured_bandwidth()
        seconds += plan.moved / bandwidth
        assumption = f"measured here, {run.precision} matrix products; memory {bandwidth / 1e9:.3g} GB/s"
        capacity, process = own_memory(), resident()
    else:
        kind = machine_of(machine)
        capacity, process = kind.memory, 0
        assumption = f"{share:.0%} of {count} x {kind.peak / 1e12:.0f} TFLOP/s, an assumption"
    total = seconds * plan.steps
    return Estimate(
        memory=memory,
        process=process,
        capacity=capacity,
        fits=memory + process <= capacity if capacity else None,
        rate=one * count,
        step_seconds=seconds / count,
        run_seconds=total / count,
        price=hourly * total / 3600,
        assumption=assumption,
    )


def _states(plan: Plan, run: RunConfig, count: int) -> int:
    """Return the bytes of weights, gradients and optimiser that each of so many processes keeps."""
    if run.engine == "fsdp":
        from modalora.parallel.fsdp import sizes

        _, cut, _ = sizes(run.mesh, count)
        return (plan.weights + plan.gradients + plan.optimizer) // cut
    whole = {"zero1": plan.weights + plan.gradients, "zero2": plan.weights, "zero3": 0}[run.engine]
    return whole + (plan.weights + plan.gradients + plan.optimizer - whole) // count


@dataclass(frozen=True, slots=True)
class ReadingLine:
    """What reading a prompt of so many tokens takes."""

    tokens: int
    cache: int
    memory: int
    read_seconds: float
    decode_rate: float  # tokens/s, as memory allows them


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model needs to answer. weights: bytes by part. cache_per_token: bytes."""

    weights: dict[str, int]
    cache_per_token: int
    lines: tuple[ReadingLine, ...]
    assumption: str


def plan_reading(model: str, machine: str = "this") -> Reading:
    """Return what a model, a folder or the name of a size, needs to read prompts and to answer, one row at a time.

    Reading is bound by products, 2 FLOPs a number of the decoder and token and the attention's; every further token by
    reading all weights and the cache once.
    """
    config, dtype = read_size(model)
    size = torch.empty((), dtype=dtype).element_size()
    with torch.device("meta"):
        built = Multimodal(config)
    weights = {name: count * size for name, count in parameter_counts(built).items()}
    decoder = config.decoder
    per_token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * size
    if machine == "this":
        rate, bandwidth = measured_rate("bf16" if size == 2 else "fp32"), measured_bandwidth()
        assumption = "rates measured here: "
    else:
        kind = machine_of(machine)
        rate, bandwidth = kind.peak, kind.bandwidth
        assumption = f"peak rates of a {machine}: "
    assumption += (
        f"{rate / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:.3g} GB/s; reading takes at least, decoding reaches at most"
    )
    inner = sum(p.numel() for name, p in built.decoder.named_parameters() if "embed_tokens" not in name)
    lines = []
    window = decoder.rope.window
    for tokens in sorted({min(window, 1024 * 4**power) for power in range(10)}):
        cache = tokens * per_token
        attention = 2 * decoder.num_hidden_layers * decoder.hidden_size * tokens**2  # causal: half of 4
        read = (2 * inner * tokens + attention) / rate
        held = weights["decoder"] + cache
        lines.append(ReadingLine(tokens, cache, sum(weights.values()) + cache, read, bandwidth / held))
    return Reading(weights, per_token, tuple(lines), assumption)
