"""States of a run: each is whole or not there, the newest whole one is found, a few are kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modalora.checkpoint.resume import STATE, begin, commit, draft_of, locked, newest, retire, states
from modalora.disk import draft_beside, read_json, write_json
from modalora.errors import CheckpointError, ConfigError


def save(run: Path, step: int, keep: int = 2) -> None:
    draft = draft_of(run, step)
    begin(draft)
    (draft / "data.bin").write_bytes(bytes([step]) * 8)
    write_json(draft / STATE, {"step": step})
    retire(commit(draft), keep)


def spoil(run: Path, step: int) -> None:
    path = run / "resume" / f"{step:08d}" / "data.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def kept(run: Path) -> list[int]:
    return [int(folder.name) for folder in states(run)]


def test_a_run_without_states_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert states(tmp_path) == []


def test_the_newest_states_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 20, 100):
        save(tmp_path, step)
    assert kept(tmp_path) == [20, 100]
    found = newest(tmp_path)
    assert found is not None
    assert read_json(found / STATE) == {"step": 100}


def test_an_altered_state_is_passed_over_and_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    spoil(tmp_path, 2)
    told: list[str] = []
    assert newest(tmp_path, told.append) == tmp_path / "resume" / "00000001"
    assert len(told) == 1
    assert "00000002" in told[0]
    assert "data.bin was altered" in told[0]


def test_a_run_whose_states_are_all_altered_is_not_begun_anew_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (states(tmp_path)[0] / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"no state .* is whole: .*state.json is missing.*; remove the folder"):
        newest(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_only_whole_state_is_never_retired(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 50, keep)
    save(tmp_path, 100, keep=9)
    spoil(tmp_path, 100)
    save(tmp_path, 60, keep)  # the run went on from 50; a plain sort by number would keep the spoilt 100 and drop 60
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "00000060"
    assert kept(tmp_path) == [50, 60][-keep:]


def test_a_spoilt_state_of_the_same_step_gives_way(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    spoil(tmp_path, 10)
    save(tmp_path, 10)
    assert newest(tmp_path) == tmp_path / "resume" / "00000010"
    assert kept(tmp_path) == [5, 10]


def test_what_a_killed_run_left_half_written_is_removed_at_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    begin(draft_of(tmp_path, 2))
    (draft_of(tmp_path, 2) / "data.bin").write_bytes(b"half")
    (tmp_path / "resume" / ".00000000.old").mkdir()
    draft_beside(tmp_path / "model").mkdir()
    draft_beside(tmp_path / "metrics.jsonl").write_text("half")
    assert newest(tmp_path) == tmp_path / "resume" / "00000001"
    with locked(tmp_path):
        assert [path.name for path in (tmp_path / "resume").iterdir()] == ["00000001"]
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "resume"]


def test_hidden_files_of_the_user_stay_in_the_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    names = [".env.old", ".notes.old", ".letter.draft", ".letter.draft.txt", ".my.plan.draft", ".2026.old"]
    own = [folder / name for folder in (tmp_path, tmp_path / "resume") for name in names]
    for path in own:
        path.write_text("precious")
    with locked(tmp_path):
        assert [path.read_text() for path in own] == ["precious"] * len(own)


def test_a_run_is_held_by_one_process_alone(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib; from modalora.checkpoint.resume import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process trains into"), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):  # a killed process holds nothing
        pass
