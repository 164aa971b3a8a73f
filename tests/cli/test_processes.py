"""What `train` and `extend` have alike: processes, signals outside of the work that listens to them, exit codes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from modalora.training.signals import Interrupted

Run = Callable[..., tuple[int, str, str]]
WORK = {"train": "modalora.training.run.run_recipe", "extend": "modalora.longrope2.extend.extend"}
TRAINING = {"train": ["decoder"], "mixture": [{"source": "books"}], "steps": 1, "accumulate": 2}


@pytest.fixture(params=WORK)
def verb(request: pytest.FixtureRequest) -> str:
    """Each verb that trains."""
    return str(request.param)


@pytest.fixture
def command(verb: str, tmp_path: Path) -> list[str]:
    """A recipe for it."""
    shared = {"init": "tiny", "output": str(tmp_path / "out")}
    extension = {"kind": "extend", "target": 512, "training": TRAINING, **shared}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(extension if verb == "extend" else {**TRAINING, **shared}))
    return [verb, str(path)]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the launcher hears."""
    heard: list[str] = []
    monkeypatch.setattr("modalora.cli.processes.tell_stopped", lambda: heard.append("stopped"))
    return heard


def instead(monkeypatch: pytest.MonkeyPatch, verb: str, happens: Callable[[], Any]) -> None:
    monkeypatch.setattr(WORK[verb], lambda *given: happens())


def broken_off(number: signal.Signals | None) -> Callable[[], None]:
    def happens() -> None:
        raise KeyboardInterrupt if number is None else Interrupted("it was saved", number)

    return happens


def test_sigterm_where_nothing_listens_ends_with_0(
    verb: str, command: list[str], told: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    instead(monkeypatch, verb, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*command) == (
        0,
        "",
        "modalora: ended at once; what was saved is whole\n",
    )
    assert told == ["stopped"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("number", "ends"),
    [
        (signal.SIGTERM, (0, "", "modalora: ended at once; what was saved is whole\n")),
        (signal.SIGINT, (130, "", "modalora: interrupted\n")),
    ],
)
def test_a_signal_is_heard_though_a_library_drops_it(
    verb: str,
    command: list[str],
    told: list[str],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    ends: tuple[int, str, str],
) -> None:
    def drop() -> None:
        with suppress(SystemExit, KeyboardInterrupt):
            signal.raise_signal(number)
        time.sleep(30)
        pytest.fail("it was not heard")

    monkeypatch.setattr("modalora.cli.processes.AGAIN_SECONDS", 0.1)
    instead(monkeypatch, verb, drop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        assert run(*command) == ends
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_cleans_up_behind_a_signal_is_left_alone(
    verb: str, command: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(0.3)
            done.append("cleaned")

    monkeypatch.setattr("modalora.cli.processes.AGAIN_SECONDS", 0.05)
    instead(monkeypatch, verb, work)
    assert run(*command)[0] == 0
    assert done == ["cleaned"]


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGTERM, 0, "it was saved"), (signal.SIGINT, 130, "it was saved"), (None, 130, "interrupted")],
)
def test_what_was_broken_off_tells_its_launcher_and_ends_with_its_code(
    verb: str,
    command: list[str],
    told: list[str],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals | None,
    code: int,
    line: str,
) -> None:
    instead(monkeypatch, verb, broken_off(number))
    assert run(*command) == (code, "", f"modalora: {line}\n")
    assert told == ["stopped"]


def test_gpus_are_processes_already(command: list[str], run: Run) -> None:
    code, _, err = run(*command, "--gpus", "2", "--processes", "2")
    assert (code, "leave --processes out" in err) == (2, True)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("optim.state_bits=8", "base_bits and optim.state_bits save memory in one process"),
        ("mesh.shard=5", "do not make up 2 processes"),
        ("accumulate=3", "accumulate=3 micro-batches cannot be shared by 2 processes"),
    ],
)
def test_what_two_processes_cannot_do_is_told_before_they_start(
    verb: str, command: list[str], run: Run, monkeypatch: pytest.MonkeyPatch, setting: str, line: str
) -> None:
    monkeypatch.setattr("modalora.parallel.launch.launch", lambda *given: pytest.fail("they were started"))
    code, _, err = run(*command, "--processes", "2", f"{'training.' * (verb == 'extend')}{setting}")
    assert (code, err.count("\n"), line in err) == (2, 1, True), err


@pytest.mark.parametrize("code", [0, 130])
def test_the_exit_code_is_that_of_the_processes(
    command: list[str], run: Run, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    started: list[tuple[list[str], int]] = []

    def launch(arguments: list[str], count: int) -> int:
        started.append((arguments, count))
        return code

    monkeypatch.setattr("modalora.parallel.launch.launch", launch)
    assert run(*command, "--gpus", "2")[0] == code
    assert started == [([*command, "device=cuda"], 2)]
