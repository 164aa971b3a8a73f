"""Two to four processes train like one: the same losses, gradients and weights, whatever the rows of each hold."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rows import row, stack
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from modalora.config import MeshConfig, OptimConfig, RunConfig, SourceConfig
from modalora.contracts import BLANK, IGNORED, Batch
from modalora.errors import CheckpointError, ConfigError, ShapeError, TrainingError
from modalora.models.multimodal import Multimodal, recompute
from modalora.models.sizes import tiny
from modalora.nn.gate import gate
from modalora.parallel.engine import Engine, Single
from modalora.parallel.fsdp import Plan, Sharded, sizes
from modalora.parallel.ranks import explained
from modalora.parallel.tensor import regroup
from modalora.parallel.zero import Zero
from modalora.training.loop import train
from modalora.training.optimizer import freeze
from modalora.training.signals import Interrupted

Ranks = Callable[..., list[Any]]

# float32 sums in another order over rows and ranks; worst seen 1.2e-7 in gradients of norm 2
GRADIENTS = {"atol": 1e-6, "rtol": 1e-6}
# DeepSpeed is at odds with parts of torch that are to go
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install -e '.[deepspeed]'")
old_ways = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
PARTS = ("adapter.*", "image.*", "audio.*")


def fresh() -> Multimodal:
    torch.manual_seed(0)
    model = Multimodal(tiny())
    with torch.no_grad():  # adapters that change something
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


class Given:
    """Micro-batches by step, of which a process takes its share."""

    def __init__(self, steps: Callable[[int], Sequence[Batch]], share: tuple[int, int]) -> None:
        self.steps, self.share, self.taken = steps, share, 0

    def take(self) -> list[Batch]:
        self.taken += 1
        first, count = self.share
        return list(self.steps(self.taken - 1))[first::count]

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken = int(state["taken"])


def mixed(step: int) -> list[Batch]:
    """Four micro-batches; neighbours hold other things."""
    kinds = ("text", "both", "image", "speech")
    return [stack(row(kinds[0], step), row(kinds[3], 7)), *(row(kinds[at], 100 * step + at) for at in (1, 2, 3))]


def undropped(step: int) -> list[Batch]:
    """Without the speech adapter: its dropout is drawn for a rank's share of the channels under tensor parallelism."""
    kinds = ("text", "both", "image", "both")
    return [row(kind, 100 * step + at) for at, kind in enumerate(kinds)]


def settings(output: Path, **changes: object) -> RunConfig:
    fields: dict[str, object] = {
        "init": "tiny",
        "output": str(output),
        "train": [*PARTS, "decoder"],
        "mixture": [SourceConfig(source="books")],
        "steps": 2,
        "precision": "fp32",
        "log_every": 1,
        "save_every": 1000,
        "optim": OptimConfig(lr=1e-3, warmup_steps=1, clip_norm=0.5),
    }
    return RunConfig.model_validate({**fields, **changes})


def run(engine: Engine, settings: RunConfig, steps: Callable[[int], list[Batch]]) -> tuple[list[float], Any]:
    """Train; return the losses and, on rank 0, the weights."""
    torch.set_num_threads(1)
    losses: list[float] = []
    model = fresh()
    if settings.recompute:
        recompute(model)
    train(settings, model, Given(steps, engine.share), lambda told: losses.append(float(told["loss"])), engine=engine)
    whole = engine.whole()
    return losses, whole.state_dict() if whole else None


def engine_of(name: str, mesh: MeshConfig | None = None, plan: Plan | None = None) -> Engine:
    device = torch.device("cpu")
    if name == "one":
        return Single()
    if name == "fsdp":
        return Sharded(mesh or MeshConfig(), plan or Plan(), device)
    engine = Zero(int(name[4]), device, offload=name.endswith("offload"), clip_norm=0.5, mesh=mesh)  # type: ignore[arg-type]
    if name.startswith("zero3"):  # else tensors as small as these stay whole
        engine.settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return engine


def trained_by(name: str, settings: RunConfig, steps: Callable[[int], list[Batch]], *more: Any) -> Any:
    return run(engine_of(name, *more), settings, steps)


@pytest.mark.parametrize(
    ("mesh", "changes", "steps"),
    [
        (MeshConfig(), {}, mixed),
        (MeshConfig(replicate=2), {}, mixed),
        (MeshConfig(tensor=2), {"recompute": True}, undropped),
        (MeshConfig(sequence=2), {"recompute": True}, undropped),
        (MeshConfig(sequence=2, ring=2), {}, undropped),
    ],
    ids=["shard", "replicate", "tensor", "sequence", "ring"],
)
def test_processes_train_like_one(
    tmp_path: Path, ranks: Ranks, mesh: MeshConfig, changes: dict[str, Any], steps: Callable[[int], list[Batch]]
) -> None:
    one, weights = run(Single(), settings(tmp_path / "one"), steps)
    found = ranks(2, trained_by, "fsdp", settings(tmp_path / "many", **changes), steps, mesh)
    for losses, _ in found:
        assert losses == pytest.approx(one, abs=1e-6, rel=0)
    assert list(found[0][1]) == list(weights)
    for name, tensor in weights.items():
        # AdamW divides by a root, so a gradient near zero moves a weight by up to the rate, 1e-3, whichever its last
        # bits: worst seen 1.1e-5, one number of 20,480, with products cut by oneDNN
        torch.testing.assert_close(found[0][1][name], tensor, atol=5e-5, rtol=0, msg=name)
    assert all(whole is None for _, whole in found[1:])


def unlike(step: int) -> list[Batch]:
    """Two micro-batches, four times: neighbours hold other media, or nothing to score."""
    pairs = [("text", "both"), ("image", "speech"), ("speech", "text"), ("both", "image")]
    if step >= len(pairs):
        return []
    names = ("one:0", "two:0")
    found = [replace(row(kind, 10 * step + at), samples=(names[at],)) for at, kind in enumerate(pairs[step])]
    blank = replace(found[1], labels=torch.full_like(found[1].input_ids, IGNORED), samples=(BLANK,))
    return [found[0], blank] if step == 2 else found


def scored_by(name: str, settings: RunConfig, steps: Callable[[int], list[Batch]], *more: Any) -> Any:
    """Train and score; return the figures of every line and, on rank 0, the weights."""
    torch.set_num_threads(1)
    told: list[dict[str, Any]] = []
    engine, model = engine_of(name, *more), fresh()
    train(settings, model, Given(steps, engine.share), told.append, engine=engine, held_out=Given(unlike, engine.share))
    whole = engine.whole()
    figures = [{key: own for key, own in line.items() if "loss" in key or key == "step"} for line in told]
    return figures, whole.state_dict() if whole else None


@old_ways
@pytest.mark.parametrize(
    ("name", "mesh", "changes"),
    [
        ("fsdp", MeshConfig(), {}),
        ("fsdp", MeshConfig(tensor=2), {"recompute": True}),
        ("fsdp", MeshConfig(sequence=2), {}),
        pytest.param("zero2", MeshConfig(), {}, marks=needs_deepspeed),
        pytest.param("zero3", MeshConfig(), {}, marks=needs_deepspeed),
    ],
    ids=["shard", "tensor", "sequence", "zero2", "zero3"],
)
def test_processes_score_like_one_and_train_on_as_without(
    tmp_path: Path, ranks: Ranks, name: str, mesh: MeshConfig, changes: dict[str, Any]
) -> None:
    scores = {"eval_mixture": [SourceConfig(source="books")], "eval_every": 1, "steps": 3}
    one, _ = scored_by("one", settings(tmp_path / "one", **scores), undropped)
    found = ranks(2, scored_by, name, settings(tmp_path / "many", **scores, **changes), undropped, mesh)
    _, weights = ranks(2, trained_by, name, settings(tmp_path / "plain", steps=3, **changes), undropped, mesh)[0]
    assert [(line["step"], "eval_loss" in line) for line in one] == [
        (0, True), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True),
    ]  # fmt: skip
    for told, _ in found:
        for line, alone in zip(told, one, strict=True):
            # worst seen 3.9e-7, behind steps of AdamW; a row that is left out moves the mean by 1e-3 or more
            assert line == pytest.approx(alone, abs=1e-6, rel=0)
    assert all(torch.equal(tensor, found[0][1][key]) for key, tensor in weights.items())


class Asking(Given):
    """Rows of which the second process is asked to stop before it takes the second time."""

    def take(self) -> list[Batch]:
        if self.taken == 1 and self.share[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().take()


def stopped(settings: RunConfig) -> str:
    engine = engine_of("fsdp")
    try:
        train(settings, fresh(), Given(mixed, engine.share), engine=engine, held_out=Asking(unlike, engine.share))
    except Interrupted as error:
        return f"{error} {error.exit_code}"
    return "it was not"


def test_a_signal_to_one_process_while_all_score_stops_all(tmp_path: Path, ranks: Ranks) -> None:
    scores = {"eval_mixture": [SourceConfig(source="books")]}
    assert ranks(2, stopped, settings(tmp_path, **scores)) == ["stopped before the first step; nothing is lost 0"] * 2
    assert not (tmp_path / "resume").exists()


def gradients(micro: list[list[Batch]], parts: Sequence[str]) -> tuple[dict[str, Tensor | None], list[str]]:
    """Return the whole gradients of a step whose processes have these micro-batches, and which parts are frozen."""
    many = dist.is_initialized()
    engine: Engine = Sharded(MeshConfig(), Plan(), torch.device("cpu")) if many else Single()
    own = micro[engine.rank] if many else [batch for batches in micro for batch in batches]
    model = fresh()
    freeze(model, parts)
    engine.shard(model, nn.Module())
    model.train()
    for number, batch in enumerate(engine.level(own), start=1):
        torch.manual_seed(int(batch.lengths.sum()))  # dropout
        engine.backward(model.loss(batch)[0].sum() / 50, last=number == len(own))
    whole: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        assert not many or isinstance(parameter, DTensor)  # frozen ones are cut too
        found = parameter.grad
        whole[name] = found.full_tensor() if isinstance(found, DTensor) else found
    return whole, [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize(
    "micro",
    [
        [[row("text", 1)], [row("both", 2)]],
        [[row("image", 1), row("text", 2)], [row("text", 3), row("speech", 4)]],
        [[row("speech", 2)], [stack(row("speech", 1), row("image", 6))]],
    ],
    ids=["text | both", "image, text | text, speech", "speech | speech and image"],
)
def test_a_rank_without_a_modality_takes_part(ranks: Ranks, micro: list[list[Batch]]) -> None:
    parts = [*PARTS]
    told, frozen = gradients(micro, parts)
    for found, still in ranks(2, gradients, micro, parts):
        assert still == frozen
        for name, gradient in told.items():
            # what nothing anywhere reached has no gradient, as in one process
            assert (found[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, **GRADIENTS, msg=name)
    assert frozen
    assert all(told[name] is None for name in frozen)


class Singly(nn.Module):
    """An encoder, as others may write it, that goes through its items one by one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, items: list[dict[str, Tensor]]) -> list[Tensor]:
        return [self.inner([item])[0] for item in items]


def singly() -> Multimodal:
    torch.manual_seed(0)
    model = Multimodal(tiny())
    model.encoders["audio"] = Singly(model.encoders["audio"])
    return model


def test_ranks_may_give_an_encoder_unlike_numbers_of_items(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "fresh", singly)
    micro = [[stack(row("speech", 1), row("speech", 3), row("both", 5))], [row("speech", 8)]]
    told, _ = gradients(micro, [*PARTS])
    for found, _ in ranks(2, gradients, micro, [*PARTS]):
        for name, gradient in told.items():
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, **GRADIENTS, msg=name)


def refused() -> str:
    with pytest.raises(ConfigError) as error:
        engine_of("zero3").shard(singly(), nn.Module())
    return str(error.value)


@needs_deepspeed
def test_zero3_refuses_an_encoder_that_may_run_its_blocks_per_item(ranks: Ranks) -> None:
    for told in ranks(2, refused):
        assert "audio's may run once per item" in told


def test_without_a_smallest_item_the_rank_would_hang_or_fail(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what the test above proves does not hold by itself."""
    monkeypatch.setattr("modalora.parallel.idle.Presence.level", lambda self, batches: list(batches))
    with pytest.raises(AssertionError, match=r"hangs|rank \d:"):
        ranks(2, gradients, [[row("text", 1)], [row("both", 2)]], [*PARTS], seconds=8)


@needs_deepspeed
@old_ways
@pytest.mark.parametrize(
    ("name", "mesh", "steps"),
    [
        ("zero2", MeshConfig(), mixed),
        ("zero3", MeshConfig(), mixed),
        ("zero2", MeshConfig(sequence=2, ring=2), undropped),
        ("zero3", MeshConfig(sequence=2, ulysses="deepspeed"), undropped),
    ],
    ids=["zero2", "zero3", "zero2, a ring", "zero3, its own Ulysses"],
)
def test_deepspeed_trains_like_one_process(
    tmp_path: Path, ranks: Ranks, name: str, mesh: MeshConfig, steps: Callable[[int], list[Batch]]
) -> None:
    one, weights = run(Single(), settings(tmp_path / "one"), steps)
    found = ranks(2, trained_by, name, settings(tmp_path / "many"), steps, mesh)
    for losses, _ in found:
        assert losses == pytest.approx(one, abs=1e-6, rel=0)
    for tensor_name, tensor in weights.items():
        # AdamW divides by a root: worst seen 5e-6 at this rate
        torch.testing.assert_close(found[0][1][tensor_name], tensor, atol=1e-5, rtol=0, msg=tensor_name)


def any_mix(step: int) -> list[Batch]:
    """Four micro-batches of none, one or several media, of which two processes hold unlike numbers."""
    speech, image, both, text = (
        [row(kind, 100 * step + at) for at in range(3)] for kind in ("speech", "image", "both", "text")
    )
    unscored = replace(text[2], labels=torch.full_like(text[2].input_ids, IGNORED))
    return [
        [stack(*speech), stack(speech[0]), text[0], both[0]],
        [text[0], stack(*image, both[0]), image[0], stack(*text)],
        [text[0], text[1], unscored, stack(text[0], *both)],
        [image[0], stack(*speech[:2]), stack(*speech, *both), image[1]],
    ][step]


@needs_deepspeed
@old_ways
@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        ([*PARTS, "decoder"], {}),
        ([*PARTS], {"recompute": True}),
        (["adapter.vision", "image.*"], {}),
        (["adapter.*"], {}),
    ],
    ids=["all", "all but the decoder", "pictures", "adapters"],
)
def test_zero3_trains_like_zero2_whatever_the_rows_of_each_process_hold(
    tmp_path: Path, ranks: Ranks, parts: list[str], changes: dict[str, Any]
) -> None:
    told = {"train": parts, "steps": 4, **changes}
    (two, weights), _ = ranks(2, trained_by, "zero2", settings(tmp_path / "two", **told), any_mix)
    for losses, whole in ranks(2, trained_by, "zero3", settings(tmp_path / "three", **told), any_mix):
        assert losses == pytest.approx(two, abs=1e-6, rel=0)  # worst seen 2.6e-8
        for name, tensor in (whole or {}).items():  # AdamW divides by a root: worst seen 2.7e-6
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=0, msg=name)


def twelve(step: int) -> list[Batch]:
    """Twelve micro-batches, which one to four processes share evenly."""
    return [row(("text", "both", "image", "speech")[at % 4], 100 * step + at) for at in range(12)]


@old_ways
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp", 2), ("one", 1)),
        (("fsdp", 2), ("fsdp", 3)),
        pytest.param(("zero3", 2), ("one", 1), marks=needs_deepspeed),
        pytest.param(("one", 1), ("zero2", 2), marks=needs_deepspeed),
    ],
    ids=lambda pair: f"{pair[0]} on {pair[1]}",
)
def test_a_state_is_read_at_any_number_of_processes(
    tmp_path: Path, ranks: Ranks, before: tuple[str, int], after: tuple[str, int]
) -> None:
    def go_on(name: str, world: int, steps: int) -> list[float]:
        told = settings(tmp_path / "run", steps=steps, optim=OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant"))
        if name == "one":
            return run(Single(), told, twelve)[0]
        return ranks(world, trained_by, name, told, twelve)[0][0]

    same = settings(tmp_path / "told", steps=2, optim=OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant"))
    told, _ = run(Single(), same, twelve)
    first = go_on(*before, 1)
    (last,) = go_on(*after, 2)
    assert [*first, last] == pytest.approx(told, abs=1e-6, rel=0)
    written = {path.suffix for path in (tmp_path / "run" / "resume").rglob("*") if path.is_file()}
    assert written == {".json", ".safetensors"}  # nothing that runs when it is opened


def save_once(engine_name: str, settings: RunConfig) -> Path:
    run(engine_of(engine_name), settings, twelve)
    return Path(settings.output)


def read_back(folder: Path) -> str:
    """Return what resuming from a state is refused with."""
    try:
        run(engine_of("fsdp"), settings(folder, steps=2), twelve)
    except CheckpointError as error:
        return str(error)
    return "it was taken"


def test_a_state_with_a_piece_missing_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    ranks(2, save_once, "fsdp", settings(tmp_path, steps=1))
    (state,) = (tmp_path / "resume").iterdir()
    next((state / "weights").glob("shard-00002*")).unlink()
    for told in ranks(2, read_back, tmp_path):
        assert "is whole" in told
        assert "shard-00002" in told


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        (MeshConfig(replicate=3), "do not make up 4"),
        (MeshConfig(shard=2), "do not make up 4"),
        (MeshConfig(tensor=8), "do not make up 4"),
    ],
)
def test_a_mesh_that_is_not_all_processes_is_refused(mesh: MeshConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sizes(mesh, 4)


def test_a_mesh_takes_the_rest_for_shards() -> None:
    assert sizes(MeshConfig(replicate=2, tensor=2), 8) == (2, 2, 2)


def test_rows_regrouped_for_ranks_come_back() -> None:
    """Each of two ranks has half of the queries, half of the keys and half of the values."""
    rows = torch.arange(16)[:, None]
    parts = (8, 4, 4)
    cut = regroup(rows, parts, 2)
    assert cut[:8, 0].tolist() == [0, 1, 2, 3, 8, 9, 12, 13]
    assert torch.equal(regroup(cut, parts, 2, back=True), rows)


def test_a_gate_gives_zeros_to_what_is_unused_and_reads_none_of_it() -> None:
    x, idle = torch.ones(3, requires_grad=True), torch.full((2,), torch.nan, requires_grad=True)
    passed, _ = gate(x, idle)
    (passed * 2).sum().backward()
    assert torch.equal(passed, x)
    assert x.grad is not None
    assert idle.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
    assert idle.grad.tolist() == [0, 0]


def half(_: None) -> tuple[list[float], set[torch.dtype]]:
    """Return the losses of a run in bf16 and what its moments are kept in."""
    engine = engine_of("fsdp", MeshConfig(), Plan(bf16=True))
    told = settings(Path(os.environ["MODALORA_TEST_OUTPUT"]), precision="bf16")
    return run(engine, told, mixed)[0], {one.dtype for one in engine.optimizer.state().values()}  # type: ignore[attr-defined]


def test_bf16_gathers_halves_and_keeps_float32(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = run(Single(), settings(tmp_path / "one", precision="bf16"), mixed)
    monkeypatch.setenv("MODALORA_TEST_OUTPUT", str(tmp_path / "many"))
    for losses, kinds in ranks(2, half, None):
        # norms are read in bf16 too, of eight bits: worst seen 1e-3
        assert losses == pytest.approx(one, abs=5e-3)
        assert kinds == {torch.float32}


@pytest.mark.parametrize("name", ["one", "fsdp"])
def test_what_is_saved_in_the_background_is_of_its_own_step(tmp_path: Path, ranks: Ranks, name: str) -> None:
    changes = {"steps": 4, "save_every": 1, "keep": 9}
    for behind in (False, True):
        told = settings(tmp_path / str(behind), save_in_background=behind, **changes)
        ranks(2 if name == "fsdp" else 1, trained_by, name, told, undropped)
    states = sorted((tmp_path / "False" / "resume").iterdir())
    assert len(states) == 4
    for state in states:
        for path in [*state.rglob("weights*/*"), *state.rglob("optimizer*/*"), *state.glob("[wo]*.safetensors")]:
            if path.suffix != ".safetensors":
                continue
            there = load_file(tmp_path / "True" / path.relative_to(tmp_path / "False"))
            for tensor_name, tensor in load_file(path).items():
                assert torch.equal(tensor, there[tensor_name]), (path, tensor_name)


def no_room(settings: RunConfig) -> str:
    """Return what a run says whose second rank cannot write its pieces."""
    if dist.get_rank() == 1:

        def full(self: object, *given: object) -> None:
            raise OSError(28, "No space left on device")

        HuggingFaceStorageWriter.write_data = full  # type: ignore[method-assign, assignment]
    try:
        run(engine_of("fsdp"), settings, undropped)
    except TrainingError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("behind", [False, True])
def test_a_rank_that_cannot_write_leaves_no_state_and_all_are_told(tmp_path: Path, ranks: Ranks, behind: bool) -> None:
    for told in ranks(2, no_room, settings(tmp_path, steps=1, save_in_background=behind)):
        assert "the state of step 1 could not be written" in told
        assert "rank 1: [Errno 28] No space left on device" in told
    assert list((tmp_path / "resume").iterdir()) == []


def wait_in_vain() -> str:
    """Return what the first process says when the second does not come."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(3)
        return "late"
    try:
        with explained():
            dist.all_reduce(torch.ones(1), group=group)
    except TrainingError as error:
        return str(error)
    return "nothing"


def test_a_process_that_does_not_come_is_told(ranks: Ranks) -> None:
    told, _ = ranks(2, wait_in_vain)
    assert "process 0 waited for another, which does not answer" in told


def test_a_process_that_ends_while_an_encoder_is_gathered_is_told() -> None:
    told = "the encoder of the modality 'smell' fails with RuntimeError: [pair.cc:534] Connection closed by peer"
    with pytest.raises(TrainingError, match="waited for another, which has ended"), explained():
        raise ShapeError(told)
