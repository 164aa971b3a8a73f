"""Stopped, killed, out of room: a run goes on with the same bits, and what was saved stays whole."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import Steps, assert_same_bits, fresh, mixed, settings, weights

from modalora.checkpoint.files import seal
from modalora.checkpoint.resume import begin, newest, states
from modalora.contracts import Batch
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError, ConfigError, TrainingError
from modalora.models.multimodal import Multimodal
from modalora.parallel.engine import Single, Snapshot, Whole
from modalora.parallel.files import write_whole
from modalora.training.loop import train
from modalora.training.randomness import random_state, seed_all, set_random_state
from modalora.training.signals import Interrupted

PARTS = ("adapter.*", "image.projector.*")


def steps(tmp_path: Path, **changes: object) -> Any:
    return settings(tmp_path, *PARTS, **{"steps": 6, "save_every": 2, "ledger": True, **changes})


def data() -> Steps:
    def make(step: int) -> list[Batch]:
        batch = mixed(step)
        names = tuple(f"mixed:{4 * step + row}" for row in range(4))
        named = Batch(batch.input_ids, batch.lengths, batch.route, batch.media, batch.labels, samples=names)
        return [named.select([0, 1]), named.select([2, 3])]

    return Steps(make)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    model = fresh()
    train(steps(folder), model, data())
    return folder, weights(model)


def lines(path: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "labels_per_second", "remaining_seconds", "memory_mb")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


def go_on(folder: Path, whole: tuple[Path, dict[str, Tensor]], **changes: object) -> None:
    """Resume, and compare all that a run leaves behind with the undisturbed run."""
    model = fresh()
    train(steps(folder, **changes), model, data())
    assert_same_bits(weights(model), whole[1])
    for name in ("metrics.jsonl", "ledger.jsonl"):
        assert lines(folder / name) == lines(whole[0] / name)
    hidden = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
    assert hidden == []


@dataclass(frozen=True)
class Watched(Whole):
    """A snapshot that tells of each file that it has written."""

    at: Callable[[str], None]

    def write(self, folder: Path, notes: Mapping[str, str]) -> None:
        write_whole(folder / "weights", self.weights, notes)
        self.at("save")
        write_whole(folder / "optimizer", self.moments, notes)
        self.at("save")


class At(Single):
    """An engine that does something at one moment."""

    def __init__(self, moment: str, number: int, work: Callable[[], None]) -> None:
        self.moment, self.left, self.work = moment, number, work

    def at(self, moment: str) -> None:
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                self.work()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss, last=last)
        self.at("backward")

    def clip(self, trained: Mapping[str, torch.nn.Parameter], norm: Tensor, limit: float) -> None:
        self.at("update")
        super().clip(trained, norm, limit)

    def snapshot(self, trained: Mapping[str, torch.nn.Parameter], *, copied: bool) -> Snapshot:
        taken = super().snapshot(trained, copied=copied)
        assert isinstance(taken, Whole)
        return Watched(taken.weights, taken.moments, self.at)


def ask(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("moment", "number", "after"), [("backward", 8, 2), ("update", 4, 4), ("save", 1, 2), ("save", 4, 4)]
)
def test_a_signal_at_any_moment_loses_nothing(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]], moment: str, number: int, after: int
) -> None:
    with pytest.raises(Interrupted, match=f"stopped after step {after};") as stopped:
        train(steps(tmp_path), fresh(), data(), engine=At(moment, number, ask(signal.SIGTERM)))
    assert stopped.value.exit_code == 0
    found = newest(tmp_path)
    assert found is not None
    assert int(found.name) == after
    go_on(tmp_path, whole)


def test_a_wait_for_data_is_broken_off(tmp_path: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    given = data()
    make = given.make

    def late(step: int) -> list[Batch]:
        if step == 3:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            signal.pause()  # would wait for ever
        return make(step)

    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    given.make = late
    with pytest.raises(Interrupted, match="stopped after step 3;") as stopped:
        train(steps(tmp_path), fresh(), given)
    assert stopped.value.exit_code == 130
    go_on(tmp_path, whole)


def test_a_signal_before_the_first_step_ends_the_run(tmp_path: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    class Asking(Single):
        def shard(self, model: Multimodal, objective: torch.nn.Module) -> None:
            super().shard(model, objective)
            ask(signal.SIGTERM)()

    with pytest.raises(Interrupted, match="before the first step; nothing is lost"):
        train(steps(tmp_path), fresh(), data(), engine=Asking())
    go_on(tmp_path, whole)


def test_the_second_ctrl_c_stops_at_once_and_leaves_the_state_before(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]]
) -> None:
    def twice() -> None:
        ask(signal.SIGINT)()
        ask(signal.SIGINT)()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at once") as stopped:
        train(steps(tmp_path), fresh(), data(), engine=At("save", 3, twice))  # in the second save
    assert not isinstance(stopped.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) == before
    assert [folder.name for folder in states(tmp_path)] == ["00000002"]
    go_on(tmp_path, whole)


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_a_random_moment_loses_nothing(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]], seed: int
) -> None:
    rng = random.Random(seed)
    moment, number = rng.choice([("backward", rng.randint(5, 12)), ("save", rng.randint(3, 6))])
    child = os.fork()
    if child == 0:
        try:
            train(steps(tmp_path), fresh(), data(), engine=At(moment, number, ask(signal.SIGKILL)))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    go_on(tmp_path, whole)


@pytest.fixture
def little_room() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond some bytes: the system then refuses writes, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_keeps_the_state_before(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]], little_room: Callable[[int], None]
) -> None:
    engine = At("save", 2, lambda: little_room(20_000))  # the first save is done, the second one fails
    told = r"state of step 4 could not be written .*File too large.*make room .* which goes on from the state before it"
    with pytest.raises(TrainingError, match=told):
        train(steps(tmp_path), fresh(), data(), engine=engine)
    little_room(resource.RLIM_INFINITY)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["00000002"]
    go_on(tmp_path, whole)


def test_a_disk_that_is_full_before_any_state_says_that_the_run_begins_anew(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]], little_room: Callable[[int], None]
) -> None:
    engine = At("save", 1, lambda: little_room(20_000))
    with pytest.raises(TrainingError, match=r"state of step 2 .* make room .* begins anew: no state was before it"):
        train(steps(tmp_path), fresh(), data(), engine=engine)
    little_room(resource.RLIM_INFINITY)
    assert list((tmp_path / "resume").iterdir()) == []
    go_on(tmp_path, whole)


@pytest.mark.parametrize("number", [1, 4, 8, 12])
def test_a_disk_that_fails_at_any_sync_keeps_the_state_before(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, seen = os.fsync, 0

    def failing(handle: int) -> None:
        nonlocal seen
        seen += (tmp_path / "resume" / "00000002").exists()
        if seen == number:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(TrainingError, match="No space left on device"):
        train(steps(tmp_path), fresh(), data())
    monkeypatch.undo()
    assert newest(tmp_path) is not None
    assert not list((tmp_path / "resume").glob(".*"))
    go_on(tmp_path, whole)


def test_a_state_that_could_not_be_written_behind_training_ends_the_run_at_the_next(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    run = steps(tmp_path, save_in_background=True)
    with pytest.raises(TrainingError, match="the state of step 2 could not be written"):
        train(run, fresh(), data(), engine=At("save", 1, full))
    assert lines(tmp_path / "metrics.jsonl")[-1]["step"] == 4
    assert list((tmp_path / "resume").iterdir()) == []


def test_a_state_is_there_once_its_lines_are_on_the_disk_and_is_there_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int | str] = []
    real, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        real(handle)

    def renamed(path: Path, target: Path) -> Path:
        done.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    train(steps(tmp_path, steps=2), fresh(), data())
    sealed = done.index("00000002")
    for name in ("metrics.jsonl", "ledger.jsonl"):
        assert (tmp_path / name).stat().st_ino in done[:sealed], name
    assert (tmp_path / "resume").stat().st_ino in done[sealed:]


@pytest.fixture(scope="module")
def cut_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 4, with the states of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(Interrupted):
        train(steps(folder), fresh(), data(), engine=At("update", 4, ask(signal.SIGTERM)))
    return folder


def test_a_state_that_is_written_late_is_of_its_own_step(
    tmp_path: Path, cut_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = Event()

    def late(draft: Path) -> None:
        assert behind.wait(60)
        begin(draft)

    monkeypatch.setattr("modalora.training.states.begin", late)
    run = steps(tmp_path, save_in_background=True, keep=9)
    train(run, fresh(), data(), engine=At("update", 4, behind.set))  # step 3 is over then
    now, then = (folder / "resume" / "00000002" for folder in (tmp_path, cut_once))
    for name in ("weights", "optimizer", "random-00000"):
        assert_same_bits(*(load_file(folder / f"{name}.safetensors") for folder in (now, then)))
    told, wanted = (read_json(folder / "state.json") for folder in (now, then))
    assert (told["progress"], told["data"]) == (wanted["progress"], wanted["data"])


@pytest.fixture
def cut(cut_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(cut_once, tmp_path / "cut"))


def reseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    seal(folder)


@pytest.mark.parametrize("name", ["weights", "optimizer", "random-00000"])
def test_a_missing_or_stale_part_of_a_state_is_noticed(cut: Path, name: str) -> None:
    before, last = states(cut)
    file = f"{name}.safetensors"
    kept = (last / file).read_bytes()
    (last / file).unlink()
    reseal(last)
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read"):
        train(steps(cut), fresh(), data())
    shutil.copy(before / file, last / file)
    reseal(last)
    with pytest.raises(CheckpointError, match=rf"{file} is of step '2', the state it lies in of '4'"):
        train(steps(cut), fresh(), data())
    (last / file).write_bytes(kept)
    reseal(last)
    train(steps(cut), fresh(), data())


def test_a_state_of_fewer_bits_is_noticed(cut: Path) -> None:
    last = states(cut)[-1]
    tensors = load_file(last / "optimizer.safetensors")
    name = next(name for name in tensors if name.endswith("exp_avg"))
    notes = {"run": read_json(last / "state.json")["run"], "step": "4"}
    write_whole(last / "optimizer", {**tensors, name: tensors[name].bfloat16()}, notes)
    reseal(last)
    with pytest.raises(CheckpointError, match=rf"{name} is \[.*\] of torch.bfloat16, not \[.*\] of torch.float32"):
        train(steps(cut), fresh(), data())


@pytest.mark.parametrize("key", ["run", "step", "world", "settings", "rate", "progress", "data", "frozen"])
def test_a_missing_field_of_a_state_is_noticed(cut: Path, key: str) -> None:
    last = states(cut)[-1]
    fields = read_json(last / "state.json")
    del fields[key]
    write_json(last / "state.json", fields)
    reseal(last)
    with pytest.raises((CheckpointError, ConfigError), match=key):
        train(steps(cut), fresh(), data())


@pytest.mark.parametrize("key", ["step", "rate", "progress", "data"])
def test_a_field_of_an_earlier_state_is_noticed(cut: Path, key: str) -> None:
    before, last = states(cut)
    stale = read_json(before / "state.json")
    write_json(last / "state.json", read_json(last / "state.json") | {key: stale[key]})
    reseal(last)
    with pytest.raises(CheckpointError, match=r"step|rate"):
        train(steps(cut), fresh(), data())


def test_a_run_goes_on_only_from_the_base_that_it_began_on(cut: Path) -> None:
    other = fresh()
    with torch.no_grad():
        other.decoder.embed_tokens.weight[5, 7] += 1e-3
    with pytest.raises(ConfigError, match="was trained on another base"):
        train(steps(cut), other, data())


def test_lines_behind_the_state_are_taken_away_and_written_again(
    cut: Path, whole: tuple[Path, dict[str, Tensor]]
) -> None:
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')  # as a killed process leaves it
    go_on(cut, whole)


def test_a_finished_run_is_not_trained_again(cut: Path) -> None:
    train(steps(cut), fresh(), data())
    given = data()
    last = train(steps(cut), fresh(), given)
    assert given.taken == 6  # set back to its place, and not asked for more
    assert last["step"] == 6


def test_every_generator_comes_back_to_where_it_was() -> None:
    def draw() -> tuple[Any, ...]:
        drawn = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return random.random(), random.gauss(0, 1), drawn, torch.rand(3).tolist(), torch.randn(5).tolist()

    seed_all(3)
    draw()
    before = random_state()
    first = draw()
    assert draw() != first
    set_random_state(before)
    assert draw() == first
    seed_all(3)
    one = draw()
    seed_all(3, 1)
    assert draw() != one


def test_the_place_in_the_data_is_needed(
    cut: Path, whole: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Steps, "restore", lambda self, state: None)
    model = fresh()
    train(steps(cut), model, data())
    assert any(not torch.equal(own, whole[1][name]) for name, own in weights(model).items())


def test_dropout_follows_from_the_step_and_not_from_what_was_drawn_before(
    cut: Path, whole: tuple[Path, dict[str, Tensor]]
) -> None:
    given = data()
    make = given.make

    def drawing(step: int) -> list[Batch]:
        torch.rand(step + 3)
        return make(step)

    given.make = drawing
    model = fresh()
    train(steps(cut), model, given)
    assert_same_bits(weights(model), whole[1])
