"""`adapter new`: the package works as it stands, and a time series becomes a modality by changing it alone."""

from __future__ import annotations

import difflib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modalora
from modalora import modality
from modalora.checkpoint.adapters import save_adapter
from modalora.errors import CheckpointError, ConfigError
from modalora.processing.questions import question_messages
from modalora.scaffold import new_package

Run = Callable[..., tuple[int, str, str]]

# What a user changes to read the motion of a wrist, two channels of acceleration, as CSV files: old -> new.
CHANGES = {
    "    patch: int = 4  # numbers in one token": "    patch: int = 4  # moments in one token, of two channels each",
    "        values = torch.as_tensor(np.asarray(payload, dtype=np.float32))": (
        "        values = torch.as_tensor(np.asarray(payload, dtype=np.float32)).view(-1, 2)"
    ),
    "    if values.ndim != 1 or not 1": "    if not 1",
    "    values = functional.pad(values, (0, -len(values) % sizes.patch))": (
        "    values = functional.pad(values, (0, 0, 0, -len(values) % sizes.patch))"
    ),
    "    patches = values.view(-1, sizes.patch)": "    patches = values.reshape(-1, 2 * sizes.patch)",
    "nn.Linear(sizes.patch, width)": "nn.Linear(2 * sizes.patch, width)",
    'KINDS = ("rising", "falling", "wave", "noise")': 'KINDS = ("left circle", "right circle", "shake", "rest")',
    'QUESTION = "What does the series show?"': 'QUESTION = "How does the hand move?"',
    "    slope = rng.uniform(0.5, 2.0)": "    turn = 2 * np.pi * (rng.uniform(1.5, 3.0) * time + rng.random())",
    '        "rising": slope * (time - 0.5),': '        "left circle": np.stack((np.cos(turn), np.sin(turn)), 1),',
    '        "falling": slope * (0.5 - time),': '        "right circle": np.stack((np.cos(turn), -np.sin(turn)), 1),',
    '        "wave": slope / 2 * np.sin(2 * np.pi * (rng.uniform(2, 5) * time + rng.random())),': (
        '        "shake": np.stack((np.cos(turn), np.cos(turn)), 1),'
    ),
    '        "noise": 0.4 * rng.standard_normal(len(time)),': '        "rest": np.zeros((len(time), 2)),',
    "0.05 * rng.standard_normal(len(time))": "0.05 * rng.standard_normal((len(time), 2))",
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test leaves no modality behind."""
    monkeypatch.setattr(modality, "_given", {})
    return


def install(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Do what `pip install -e` would: put the folder on the path, with the metadata of its pyproject."""
    import tomllib

    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["modalora.modalities"]
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[modalora.modalities]", *lines]))
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(f"modalora_{name}")


def test_the_package_passes_its_own_tests_as_it_stands(tmp_path: Path) -> None:
    files = new_package("wave_form", tmp_path / "package")
    assert files == ["modalora_wave_form.py", "pyproject.toml", "recipe.yaml", "test_wave_form.py", "README.md"]
    for name in files:
        assert "$" not in (tmp_path / "package" / name).read_text()
    source = str(Path(modalora.__file__).parents[1])
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "."]
    environment = {"PYTHONPATH": f"{source}:{tmp_path / 'package'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path / "package", env=environment, capture_output=True, text=True)
    assert "5 passed" in done.stdout, done.stdout + done.stderr


def test_a_time_series_becomes_a_modality_by_changing_the_scaffold_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    folder = tmp_path / "modalora-motion"
    assert run("adapter", "new", "--modality", "motion", "--out", str(folder))[0] == 0
    module = folder / "modalora_motion.py"
    written = module.read_text()
    changed = written
    for old, new in CHANGES.items():
        assert changed.count(old) == 1, old
        changed = changed.replace(old, new)
    module.write_text(changed)
    edited = [line for line in difflib.ndiff(written.splitlines(), changed.splitlines()) if line.startswith("+ ")]
    assert len(edited) <= 150
    own = install(folder, "motion", monkeypatch)

    monkeypatch.chdir(tmp_path)
    short = ["steps=60", "rows=8", "threads=1", "optim.warmup_steps=5", "log_every=60"]
    code, out, err = run("train", str(folder / "recipe.yaml"), *short)
    assert (code, "wrote runs/motion/model" in out) == (0, True), err

    rng = np.random.default_rng(99)  # series that no training row held
    cases = [(kind, own.make(kind, rng)) for kind in own.KINDS for _ in range(8)]
    asked = [question_messages(own.QUESTION, media={"motion": series}) for _, series in cases]
    model = modalora.load("runs/motion/model")
    answers = [answer.text for answer in model.ask_many(asked, max_tokens=8)]
    right = sum(answer == kind for answer, (kind, _) in zip(answers, cases, strict=True))
    assert right >= 28, answers  # of 32; guessing gives 8

    # the adapter's folder alone, on the bundled model, says the same and leaves text to the bit
    nano = modalora.load("nano")
    text = nano.logits("The old man went home.")
    assert nano.load_adapter("runs/motion/motion-lora", "motion").modules == ("motion",)
    assert torch.equal(nano.logits("The old man went home."), text)
    assert [answer.text for answer in nano.ask_many(asked[:8], max_tokens=8)] == answers[:8]

    # every verb takes it
    Path("wrist.csv").write_text("\n".join(f"{x:.4f},{y:.4f}" for x, y in cases[0][1]))
    media = ["--media", "motion=wrist.csv"]
    adapter = ["--adapter", "motion=runs/motion/motion-lora"]
    assert run("ask", "runs/motion/model", own.QUESTION, *media)[1].strip() == answers[0]
    assert run("ask", "nano", own.QUESTION, *media, *adapter)[1].strip() == answers[0]
    record = json.loads(run("route", "explain", "nano", own.QUESTION, *media, *adapter, "--json")[1])
    assert (record["adapter"], record["projectors"], record["official"]) == ("motion", {"motion": "motion"}, None)
    verified = json.loads(run("adapter", "verify", "nano", "runs/motion/motion-lora", "--json")[1])
    assert (verified["text_bits_changed"], verified["modules"], verified["matched"]) == (0, ["motion"], True)
    lines = iter(["/motion wrist.csv", own.QUESTION, "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert answers[0] in run("chat", "runs/motion/model")[1]
    code, _, err = run("ask", "nano", "?", "--media", "motion")
    assert (code, "--media 'motion' must be NAME=FILE, such as dna=gene.fasta" in err) == (2, True)


def test_a_modality_of_a_file_is_read_by_other_processes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    new_package("motion", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    file = "package/modalora_motion.py"
    settings = ["steps=2", "rows=2", "threads=1", "optim.warmup_steps=0", f"modality_files=[{file}]", "workers=1"]
    code, out, err = run("train", "package/recipe.yaml", *settings)
    assert (code, "wrote runs/motion/model" in out) == (0, True), err
    modality._given.clear()
    code, out, err = run("adapter", "verify", "runs/motion/model", "--modality-file", file)
    assert (code, "frozen tensors" in out) == (0, True), err
    modality._given.clear()
    code, _, err = run("adapter", "verify", "runs/motion/model")
    assert (code, "the modality 'motion' is not installed" in err) == (2, True)

    for verb in (["inspect"], ["adapter", "list"]):
        modality._given.clear()
        assert run(*verb, "runs/motion/model", "--modality-file", file)[0] == 0
    modality._given.clear()
    assert run("convert", "runs/motion/model", "copy", "--layout", "modalora", "--modality-file", file)[0] == 0
    modality._given.clear()
    assert run("adapter", "compose", "copy", "motion", "sum", "--modality-file", file)[0] == 0
    for more in ([], ["init=runs/motion/model", "modalities={}", "output=runs/on", "whiten=[]"]):
        for verb in ("train", "plan"):
            modality._given.clear()
            code, _, err = run(verb, "package/recipe.yaml", *settings, *more)
            assert code == 0, (verb, more, err)

    own = Path(file)
    other = Path("other.py")
    other.write_text(own.read_text())
    assert modality.load_file(other).name == "motion"  # the same words
    other.write_text(own.read_text() + "\n")
    with pytest.raises(ConfigError, match="the modality 'motion' is in .*modalora_motion.py and in .*other.py, loaded"):
        modality.load_file(other), modality.load_file(own)
    other.unlink()
    assert modality.load_file(own).name == "motion"
    Path("linked.py").symlink_to(own.resolve())
    assert modality.load_file("linked.py").name == "motion"
    own.write_text(own.read_text().replace("    features=features,", "    features=lambda *both: features(*both),"))
    code, _, err = run("train", "package/recipe.yaml", *settings, "output=runs/again")
    assert (code, "workers=1: what reads the rows cannot be sent to other processes" in err) == (2, True)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the adapters of two modalities that nano lacks, each with its encoder, and a series."""
    monkeypatch.chdir(tmp_path)
    for name in ("motion", "pulse"):
        new_package(name, tmp_path / name)
        modality.load_file(tmp_path / name / f"modalora_{name}.py")
        nano = modalora.load("nano")
        nano.add_modality(name)
        save_adapter(nano.model, name, tmp_path / f"{name}-lora")
    Path("series.txt").write_text("1 2 3 4")
    return tmp_path


def test_a_composed_adapter_is_used_beside_the_encoder_that_its_part_brought(two: Path, run: Run) -> None:
    motion = ["--adapter", "motion=motion-lora"]
    code, out, _ = run("adapter", "compose", "nano", "motion+vision@0.5", "both", *motion)
    assert (code, "the encoder of motion stays in motion-lora: rows with motion need that beside it" in out) == (
        0,
        True,
    )
    asked = ["ask", "nano", "?", "--media", "motion=series.txt", "--max-tokens", "2"]
    code, out, err = run(*asked, *motion, "--adapter", "mine=both", "--route", "mine", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["route"]["adapter"] == "mine"
    code, _, err = run(*asked, "--adapter", "motion=both")
    assert (code, err.strip()) == (
        2,
        (
            "modalora: --media motion=... cannot be read: this model reads image, audio; name one of them, or give the "
            "model or the --adapter that brings the encoder of motion"
        ),
    )


def test_an_idle_adapter_is_told_a_route_that_idles_no_other(two: Path, run: Run) -> None:
    both = ["--adapter", "motion=motion-lora", "--adapter", "pulse=pulse-lora"]
    asked = ["ask", "nano", "?", "--media", "motion=series.txt", "--max-tokens", "2", *both]
    code, _, err = run(*asked)
    assert (code, "--adapter pulse=... would change nothing" in err, "add --route pulse, or" in err) == (2, True, True)
    assert run(*asked, "--route", "pulse")[0] == 0
    code, _, err = run("ask", "nano", "Hello", *both)
    assert (code, err.endswith("does not use it for rows of text; leave the adapter out\n")) == (2, True)


@pytest.mark.parametrize("name", ["image", "Motion", "text", "a-b"])
def test_a_name_that_is_taken_or_none_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is shipped with modalora|cannot name a modality"):
        new_package(name, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    with pytest.raises(CheckpointError, match="exists; give a new folder"):
        new_package("motion", tmp_path / "package")
    assert not list((tmp_path / "package").iterdir())
