"""Everything that runs on a device, on one that is not the CPU: emulated, in a process of its own (elsewhere.py)."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("checks.py")
NAMES = [
    one.name
    for one in ast.parse(SCRIPT.read_text(encoding="utf-8")).body
    if isinstance(one, ast.FunctionDef) and any(isinstance(mark, ast.Name) for mark in one.decorator_list)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("devices"))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    told: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("name", NAMES)
def test_on_another_device(name: str, found: dict[str, str]) -> None:
    assert found[name] == "", found[name]
