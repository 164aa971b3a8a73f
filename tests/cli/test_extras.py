"""Without the extras: what needs none works, what needs one says so in a line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modalora.data.files import open_records
from modalora.data.nlvr import nlvr_scenes
from modalora.data.speech import spoken_digits
from modalora.data.text import books
from modalora.errors import DataError

BARE = """
import sys
sys.modules["pyarrow"] = sys.modules["matplotlib"] = None  # as if they were not installed
from modalora.cli.main import main
for verb in ("plan", "train"):
    sys.argv = ["modalora", verb, *sys.argv[1 if verb == "plan" else 2:]]
    try:
        main()
    except SystemExit as end:
        assert not end.code
"""


def test_json_rows_are_planned_and_trained_without_pyarrow_and_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "One?", "output": "two"}\n' * 2)
    given = [f"mixture.0.options.path={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'out'}"]
    more = ["steps=1", "optim.warmup_steps=0", "threads=1", "rows=2", "tokens=0", f"cache={tmp_path / 'cache'}"]
    command = [sys.executable, "-c", BARE, "finetune-text", *given, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "a step     2 rows" in done.stdout
    assert done.stdout.endswith(f"\nwrote {tmp_path / 'out' / 'model'}\n")
    assert (
        "no picture of the curves, which stand in metrics.jsonl: pip install -e '.[train]' in your clone draws it"
        in done.stderr
    )
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("books/train", lambda folder: list(books(folder, "train"))),
        ("nlvr/train", lambda folder: nlvr_scenes(folder, "train")),
        ("spoken_digits/train", lambda folder: spoken_digits(folder, "train")),
        ("rows", lambda folder: open_records(folder / "rows.parquet", folder / "cache")),
    ],
)
def test_a_table_without_pyarrow_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / f"{file}.parquet"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"^Parquet files need pyarrow; pip install -e '.\[train\]' in your clone$"):
        read(tmp_path)
