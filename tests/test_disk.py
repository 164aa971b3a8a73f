"""Files stay whole: a reader finds the old one or the new one, and journals end at the step that a run resumes from."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modalora.disk import Journal, draft_beside, drafted, read_lines, step_of
from modalora.errors import TrainingError


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "a.json"
    path.write_text("old")
    return path


def test_a_file_is_the_old_one_until_it_is_the_new_one(old: Path) -> None:
    with drafted(old) as draft:
        assert (draft.parent, draft.suffix, draft.name[0]) == (old.parent, ".json", ".")
        draft.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new"
    plain = old.with_name("plain")
    plain.write_text("")
    assert old.stat().st_mode == plain.stat().st_mode  # what the umask says, not a temporary file's 0600
    assert sorted(old.parent.iterdir()) == [old, plain]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_and_no_draft(old: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with drafted(old) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [(path, path.read_text()) for path in old.parent.iterdir()] == [(old, "old")]


def test_a_disk_that_is_full_leaves_the_old_file(old: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="File too large"), drafted(old) as draft:
            draft.write_bytes(bytes(2000))
        with Journal(old.with_name("log"), 0) as journal, pytest.raises(TrainingError, match="no room for a whole"):
            journal.write({"step": 1, "text": "a" * 2000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert old.read_text() == "old"
    assert len(list(old.parent.iterdir())) == 2
    assert read_lines(old.with_name("log")) == []  # the part of a line that had room is none


def test_a_killed_writer_leaves_the_old_file(old: Path) -> None:
    code = (
        "import os, pathlib, sys; from modalora.disk import drafted\n"
        "with drafted(pathlib.Path(sys.argv[1])) as draft: draft.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(old)], check=False).returncode == -signal.SIGKILL
    assert old.read_text() == "old"
    assert len(list(old.parent.glob(".*.draft.json"))) == 1  # a run removes it at its next start (test_resume.py)


def test_two_writers_of_a_file_have_drafts_of_their_own(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as on two machines that share a disk
    with drafted(old) as one, drafted(old) as other:
        one.write_text("one")
        other.write_text("other")
    assert old.read_text() == "one"  # which was put in place last
    assert draft_beside(old) != draft_beside(old)


def test_a_link_gives_way_and_what_it_led_to_stays(old: Path) -> None:
    link = old.with_name("link")
    link.symlink_to(old)
    with drafted(link) as draft:
        draft.write_text("new")
    assert (old.read_text(), link.read_text(), link.is_symlink()) == ("old", "new", False)


def test_a_journal_goes_on_behind_its_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [b'{"step": 1,  "as": "was"}', b"\0\r\0", b'{"step": null}', b'{"step": 2}', b'{"step": 3}', b'{"step":']
    path.write_bytes(b"\n".join(lines))
    with Journal(path, 2) as journal:
        assert journal.last == {"step": 2}
        assert path.read_bytes() == lines[0] + b"\n" + lines[3] + b"\n"
        journal.write({"step": 3})
    assert [step_of(line) for line in read_lines(path)] == [1, 2, 3]
    number = path.stat().st_ino
    with Journal(path, 3):
        assert path.stat().st_ino == number  # nothing to cut, nothing written
    assert read_lines(tmp_path / "none") == []
