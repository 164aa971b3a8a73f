"""Everything that runs on a device, on one that is not the CPU: emulated (elsewhere.py), and a GPU where there is one.

Each in a process of its own.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("checks.py")
MARKS = {
    one.name: mark.id
    for one in ast.parse(SCRIPT.read_text(encoding="utf-8")).body
    if isinstance(one, ast.FunctionDef)
    for mark in one.decorator_list
    if isinstance(mark, ast.Name)
}


@pytest.fixture(scope="module", params=["elsewhere", *(["cuda"] if torch.cuda.is_available() else [])])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("devices")), request.param]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    told: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("name", MARKS)
def test_on_another_device(name: str, found: dict[str, str]) -> None:
    if name not in found and MARKS[name] == "counts":
        pytest.skip("only the emulated device counts its questions")
    assert found[name] == "", found[name]
