"""`modalora train --processes N`: starts, speaks with one voice, is stopped, and notices a dead process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from modalora.checkpoint.store import load_model
from modalora.config import load_run
from modalora.training.run import run_recipe
from small import write_books

RECIPE = """
init: tiny
train: [decoder]
mixture: [{source: books}]
rows: 2
accumulate: 2
window: 32
log_every: 1
precision: fp32
optim: {warmup_steps: 1}
"""
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install -e '.[deepspeed]'")
SECONDS = 120  # a process loads torch for seconds on a busy machine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    text = "\n\n".join(f"The {word} comes and the {word} goes." for word in ("sun", "moon", "rain", "wind") * 20)
    write_books(folder, text)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def settings(place: Path, output: str, steps: int) -> list[str]:
    return [f"data={place}", f"cache={place / 'cache'}", f"output={place / output}", f"steps={steps}"]


def command(place: Path, output: str, steps: int, *more: str) -> subprocess.Popen[str]:
    recipe = str(place / "recipe.yaml")
    line = [sys.executable, "-m", "modalora.cli.main", "train", recipe, *settings(place, output, steps), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def losses(folder: Path) -> list[float]:
    path = folder / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


def children(pid: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            own = int(path.parent.name)
            yield own
            yield from children(own)


def listening(pids: list[int]) -> set[str]:
    """Return the addresses, as /proc has them, at which processes listen."""
    held: set[str] = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                held.add(str(handle.readlink()))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            pieces = line.split()
            if pieces[3] == "0A" and f"socket:[{pieces[9]}]" in held:
                found.add(pieces[1].partition(":")[0])
    return found


def wait_for_steps(run: subprocess.Popen[str], folder: Path, steps: int) -> None:
    until = time.monotonic() + SECONDS
    while len(losses(folder)) < steps:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until, "it does not train"
        time.sleep(0.05)


def end(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = run.communicate(timeout=SECONDS)
    finally:
        run.kill()
    return run.returncode, out, err


def by_rank(run: subprocess.Popen[str]) -> dict[str, int]:
    """Return the processes of a run by "RANK=0" and so on."""
    found: dict[str, int] = {}
    for pid in children(run.pid):
        values = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found |= {value: pid for value in values if value.startswith("RANK=")}
    return found


@pytest.mark.parametrize("mesh", ["mesh.shard=2", "mesh.sequence=2"])
def test_two_processes_carry_out_a_recipe_like_one(place: Path, mesh: str) -> None:
    run = command(place, mesh, 6, mesh, "--processes", "2")
    wait_for_steps(run, place / mesh, 1)
    told = listening([run.pid, *children(run.pid)])
    code, out, err = end(run)
    assert (code, out.count("wrote")) == (0, 1), err
    assert told == {"0100007F"}  # 127.0.0.1: nothing listens to the network
    assert load_model(place / mesh / "model").model.config.decoder.vocab_size == 320
    recipe = place / "recipe.yaml"
    run_recipe(load_run(recipe, settings(place, f"one {mesh}", 6)))
    # float32 sums in another order
    assert losses(place / mesh) == pytest.approx(losses(place / f"one {mesh}"), abs=1e-6)


def test_ctrl_c_saves_in_every_process_and_exits_with_130(place: Path) -> None:
    run = command(place, "stopped", 100_000, "--processes", "2")
    wait_for_steps(run, place / "stopped", 2)
    run.send_signal(signal.SIGINT)
    code, _, err = end(run)
    assert code == 130, err
    assert err.count("the same command goes on from there") == 1
    (state,) = (place / "stopped" / "resume").iterdir()
    assert int(state.name) == len(losses(place / "stopped"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("moment", ["started", "joined"])
def test_a_signal_before_the_first_step_has_nothing_to_save(
    place: Path, number: signal.Signals, code: int, moment: str
) -> None:
    run = command(place, f"early {moment} {code}", 100_000, "--processes", "2")
    until = time.monotonic() + SECONDS
    while len(by_rank(run)) < 2 or not all("libtorch" in _maps(pid) for pid in by_rank(run).values()):
        assert time.monotonic() < until
    time.sleep(0.0 if moment == "started" else 1.0)
    run.send_signal(number)
    found, _, err = end(run)
    assert found == code, err
    assert "Traceback" not in err


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("mesh.shard=5", "do not make up 2 processes"),
        ("offload=true", "offload moves what a GPU holds to the CPU"),
        ("optim.state_bits=8", "base_bits and optim.state_bits save memory in one process"),
        ("accumulate=3", "accumulate=3 micro-batches cannot be shared by 2 processes"),
    ],
)
def test_what_many_processes_cannot_do_is_told_before_they_start(place: Path, setting: str, told: str) -> None:
    code, _, err = end(command(place, "refused", 1, "--processes", "2", setting))
    assert (code, err.count("\n")) == (2, 1), err
    assert told in err


@pytest.mark.parametrize("setting", ["offload=true", "engine=zero2"])
def test_what_one_process_alone_does_not_do_is_told(place: Path, setting: str) -> None:
    code, _, err = end(command(place, "refused", 1, setting))
    assert (code, f"{setting} is for several processes, and this is one" in err) == (2, True), err


def test_a_process_that_fails_first_gives_its_exit_code_though_others_are_ended(place: Path) -> None:
    assert end(command(place, "two", 1, "--processes", "2"))[0] == 0
    code, _, err = end(command(place, "two", 1, "--processes", "2", "seed=5"))
    assert (code, "is the finished model of a run with other settings (seed)" in err) == (2, True), err
    assert "out of memory" not in err


@pytest.mark.parametrize(
    ("engine", "advice"),
    [
        ("fsdp", "lower optim.lr, mend the data, or go on with nonfinite=skip"),
        pytest.param("zero3", "lower optim.lr or mend the data", marks=needs_deepspeed),
    ],
)
def test_what_all_processes_meet_is_told_once_and_is_the_last_word(place: Path, engine: str, advice: str) -> None:
    far = ["optim.lr=1000", "optim.eps=1e-30", "optim.clip_norm=.inf", f"engine={engine}"]
    code, _, err = end(command(place, f"far {engine}", 40, "--processes", "2", *far))
    assert code == 1, err
    told = err.splitlines()[-1]
    assert re.match(
        r"modalora: step \d+: the .* is nan; not finite is the gradient of decoder\..* and \d+ more", told
    ), err
    assert told.endswith(f"; weights are as before it; {advice}")
    assert err.count("modalora: ") == 1, err
    assert "Warning" not in err


def test_processes_end_when_the_one_that_started_them_is_killed(place: Path) -> None:
    run = command(place, "orphans", 100_000, "--processes", "2")
    wait_for_steps(run, place / "orphans", 2)
    workers = by_rank(run)
    run.kill()
    run.communicate()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers.values()):
        assert time.monotonic() < until, "they train on"
        time.sleep(0.1)
    (state,) = (place / "orphans" / "resume").iterdir()
    assert int(state.name) == len(losses(place / "orphans"))


def test_a_dead_process_ends_the_run_within_seconds_and_is_named(place: Path) -> None:
    run = command(place, "killed", 100_000, "--processes", "2")
    wait_for_steps(run, place / "killed", 2)
    workers = by_rank(run)
    os.kill(workers["RANK=1"], signal.SIGKILL)
    started = time.monotonic()
    code, _, err = end(run)
    assert code == 1
    assert "process 1 was ended by SIGKILL" in err
    assert time.monotonic() - started < 30  # one second or two on an idle machine
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())


EXAMPLES = Path(__file__).parents[2] / "examples" / "launch"


def test_the_slurm_script_is_bash_and_gives_torchrun_options_that_it_has() -> None:
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    line = script.read_text().partition("torchrun \\\n")[2]
    given = re.findall(r"(--[a-z-]+)=", line)
    assert len(given) == 5
    known = get_args_parser().format_help()
    assert [option for option in given if option not in known] == []
    assert "-m modalora.cli.main train" in line


def test_ray_is_not_started_without_a_token() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    line = [sys.executable, str(EXAMPLES / "ray_train.py"), "recipe.yaml"]
    found = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 2
    assert "RAY_AUTH_MODE=token" in found.stderr
