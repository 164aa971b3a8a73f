"""`modalora train` as a process: what signals do to it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from modalora.checkpoint.resume import locked

SAVED_WITHIN_SECONDS = 5  # at nano size; this model is smaller, the machine may be busy


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A run of many short steps."""
    text = "".join(
        f"The {word} went home on day {day}.\n\n" for day in range(200) for word in ("cat", "dog", "old man")
    )
    (tmp_path / "books").mkdir()
    table = arrow.table({"name": ["one"], "title": ["One"], "text": [text]})
    parquet.write_table(table, tmp_path / "books" / "train.parquet")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{init: tiny, output: {tmp_path / 'run'}, train: [decoder], mixture: [{{source: books}}], rows: 2, "
        f"window: 16, steps: 4000, log_every: 1, save_every: 50, precision: fp32, threads: 1, ledger: true, "
        f"data: {tmp_path}, cache: {tmp_path / 'cache'}, optim: {{warmup_steps: 4}}}}"
    )
    return [sys.executable, "-c", "from modalora.cli.main import main; main()", "train", str(recipe)]


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def stop(command: list[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal once some steps are done; return the exit code and what was told."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "step 7 " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        _, told = process.communicate(timeout=SAVED_WITHIN_SECONDS)
    return process.returncode, told


def test_ctrl_c_saves_and_the_same_command_goes_on(command: list[str], tmp_path: Path) -> None:
    code, told = stop(command, signal.SIGINT)
    assert code == 130
    assert "the same command goes on from there" in told
    stopped = lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (tmp_path / "run" / "resume" / f"{stopped:08d}" / "manifest.json").exists()
    again = subprocess.run([*command, f"steps={stopped + 3}"], capture_output=True, text=True, check=True, timeout=120)
    assert f"goes on after step {stopped}" in again.stderr
    assert f"wrote {tmp_path / 'run' / 'model'}" in again.stdout
    third = subprocess.run(again.args, capture_output=True, text=True, check=True, timeout=120)
    assert third.stdout.startswith(f"finished before, kept {tmp_path / 'run' / 'model'}")
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    for name in ("metrics.jsonl", "ledger.jsonl"):
        assert lines_of(tmp_path / "run" / name) == list(range(1, stopped + 4))


def test_sigterm_saves_and_exits_with_0(command: list[str], tmp_path: Path) -> None:
    code, told = stop(command, signal.SIGTERM)
    assert code == 0
    stopped = lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert f"stopped after step {stopped};" in told
    assert (tmp_path / "run" / "resume" / f"{stopped:08d}" / "manifest.json").exists()


def test_a_second_process_may_not_train_into_the_same_folder(command: list[str], tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (refused.returncode, "another process trains into" in refused.stderr) == (2, True)
