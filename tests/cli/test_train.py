"""`modalora train` as a process: what signals do to it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import Progress, TaskID
from safetensors import SafetensorError

from modalora.checkpoint.files import seal
from modalora.checkpoint.resume import locked
from modalora.config.recipes import RECIPES
from small import write_books

Run = Callable[..., tuple[int, str, str]]
SAVED_WITHIN_SECONDS = 5  # at nano size; this model is smaller, the machine may be busy


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A run of many short steps."""
    text = "".join(
        f"The {word} went home on day {day}.\n\n" for day in range(200) for word in ("cat", "dog", "old man")
    )
    write_books(tmp_path, text)
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


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    """What trains bundled nano on two rows of text."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "One?", "output": "two"}\n' * 2)
    given = f"mixture.0.options.path={tmp_path / 'rows.jsonl'}"
    more = ["steps=2", "optim.warmup_steps=0", "threads=1", "rows=2", "tokens=0"]
    return ["train", "finetune-text", given, f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", *more]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("device=cuda:99", "device='cuda:99' cannot be used"),
        ("device=foo", "device='foo' cannot be used"),
        ("seed=-1", "seed=-1: Input should be greater"),
        ("optim.betas=[1.5,2]", "optim.betas.0=1.5: Input should be less than 1"),
        ("optim.lr=.inf", "optim.lr=inf: Input should be a finite number"),
        ("optim.fitted={lr: 1, tokens: .inf}", "Input should be a finite number"),
        ("optim.lr_scale={decoder: -1}", "optim.lr_scale.decoder=-1: Input should be greater"),
        ("threads=100000", "threads=100000: Input should be less"),
        ("output=FILE", "FILE: File exists; give a path that can be used"),
        ("output=", "output=None: Input should be a valid string"),
        ("output=''", "output='': String should have at least 1 character"),
        ("cache=FILE", "FILE/files: Not a directory; give a path that can be used"),
        ("mixture.0.options.path=[]", "path: [] names no file"),
        ("mixture.0.options.rename=abc", "source 'files', rename"),
        ("mixture.0.options.shuffle=perhaps", "source 'files', shuffle"),
        ("adapters={a.b: {r: 4, lora_alpha: 8}}", "'a.b' cannot name an adapter"),
        ("adapters={keys: {r: 4, lora_alpha: 8}}", "'keys' cannot name an adapter"),
        ("adapters={none: {r: 4, lora_alpha: 8}}", "the adapter name 'none' is taken"),
        ("preserve=[no-such-part]", "preserve: 'no-such-part' matches no part"),
        ("objective=ctc", "objective=ctc learns from one sound and what is said in it, and the row holds text alone"),
        ("objective=cells", "objective=cells learns what lies in the cells"),
        ("whiten=[audio]", "whiten: 'audio' needs a projector that trains"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(
    tmp_path: Path, run: Run, rows: list[str], setting: str, told: str
) -> None:
    (tmp_path / "file").touch()
    setting, told = (text.replace("FILE", str(tmp_path / "file")) for text in (setting, told))
    code, _, err = run(*rows, setting)
    assert (code, told in err.splitlines()[-1]) == (2, True), err
    assert not (tmp_path / "out" / "model").exists()


def test_a_model_whose_start_was_trained_anew_is_not_taken_for_finished(
    tmp_path: Path, run: Run, rows: list[str]
) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    stages = [f"output={first}", "train=[adapter.*]"], [f"output={second}", f"init={first}/model", "adapters={}"]
    for stage in stages:
        assert run(*rows, *stage)[0] == 0
    assert "finished before, kept" in run(*rows, *stages[1])[1]
    shutil.rmtree(first)
    assert run(*rows, *stages[0])[0] == 0
    assert "finished before, kept" in run(*rows, *stages[1])[1]  # the same weights
    shutil.rmtree(first)
    assert run(*rows, *stages[0], "seed=3")[0] == 0
    code, _, err = run(*rows, *stages[1])
    assert (code, f"was trained from {first}/model as it was" in err) == (2, True)
    shutil.rmtree(first)
    assert "finished before, kept" in run(*rows, *stages[1])[1]  # the stage before was removed when it was done with


def test_a_state_of_another_start_is_not_gone_on_from(tmp_path: Path, run: Run, rows: list[str]) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    one = [f"output={first}", "train=[adapter.*]"]
    for way in ([f"init={first}/model", "adapters={}"], [f"take={{adapter.mine: {first}/model}}"]):
        two = [f"output={second}", *way, "steps=4", "save_every=2"]
        assert run(*rows, *one)[0] == 0
        assert run(*rows, *two)[0] == 0
        shutil.rmtree(first)
        assert run(*rows, *one, "seed=3")[0] == 0
        code, _, err = run(*rows, *two)
        assert (code, "as it was, and that has other weights now" in err) == (2, True)
        for done in (second / "model", second / "resume" / "00000004"):
            shutil.rmtree(done)
        code, _, err = run(*rows, *two)
        assert (code, "as it was, and that has other weights now" in err) == (2, True), err
        shutil.rmtree(first)
        shutil.rmtree(second)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The decoder of nano as a published folder, with files of its own beside the weights."""
    from modalora import load
    from modalora.checkpoint.write import save_model
    from modalora.models.multimodal import Multimodal

    nano, folder = load("nano"), tmp_path / "published"
    plain = Multimodal(replace(nano.model.config, vision=None, speech=None, adapters={}))
    plain.load_state_dict({name: own for name, own in nano.model.state_dict().items() if name in plain.state_dict()})
    save_model(plain, nano.processor.tokenizer, folder, layout="phi3")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_model_that_is_trained_on_keeps_the_files_beside_its_weights(
    tmp_path: Path, run: Run, rows: list[str], published: Path
) -> None:
    code, _, err = run(*rows, f"init={published}")
    assert code == 0, err
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (published / name).read_bytes(), name
    adapter = json.loads((tmp_path / "out" / "mine-lora" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(published)
    assert run(*rows, f"output={tmp_path / 'nano'}")[0] == 0
    adapter = json.loads((tmp_path / "nano" / "mine-lora" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] is None  # nano has no published layout
    code, _, err = run(*rows, f"init={published}", f"output={published / 'out'}")
    assert (code, "lies within" in err) == (2, True), err
    assert not (published / "out").exists()


def test_rows_that_were_left_out_are_told_at_the_end(tmp_path: Path, run: Run, rows: list[str]) -> None:
    code, _, err = run(*rows)
    assert (code, "left out" in err) == (0, False), err
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('\n{"instruction": "One?", "output": ""}\n')
    code, _, err = run(*rows, f"output={tmp_path / 'bad'}", "steps=4")
    told = len((tmp_path / "bad" / "quarantine.jsonl").read_text().splitlines())
    assert told > 0
    assert (code, f"draws of bad rows that were left out: {told}, see {tmp_path}/bad/quarantine.jsonl" in err) == (
        0,
        True,
    )


def test_a_run_is_trained_from_python_as_from_the_command_line(
    tmp_path: Path, run: Run, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalora.config import load_run
    from modalora.training.run import run_recipe

    assert run(*rows, f"output={tmp_path / 'other'}")[0] == 0
    assert run_recipe(load_run(rows[1], rows[2:])) == tmp_path / "out" / "model"
    weights = "mine-lora/adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "other" / weights).read_bytes()
    own = tmp_path / "own.yaml"
    own.write_text((RECIPES / f"{rows[1]}.yaml").read_text())
    assert load_run(str(own), rows[2:]) == load_run(own, rows[2:]) == load_run(rows[1], rows[2:])


def test_the_bar_of_a_run_that_goes_on_begins_where_it_stood(
    run: Run, rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[float | None, float]] = []
    add = Progress.add_task

    def spy(self: Progress, name: str, total: float | None, completed: int) -> TaskID:
        begun.append((total, completed))
        return add(self, name, total=total, completed=completed)

    monkeypatch.setattr(Progress, "add_task", spy)
    monkeypatch.setattr("modalora.cli.train.sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    assert run(*rows)[0] == 0
    shutil.rmtree(tmp_path / "out" / "model")
    assert run(*rows, "steps=4")[0] == 0
    assert begun == [(2, 0), (4, 2)]


def test_what_was_learnt_before_the_data_ended_midway_is_saved(tmp_path: Path, run: Run, rows: list[str]) -> None:
    given = rows[2].partition("=")[2]
    phases = [f"{{source: files, name: {name}, weight: {weight}, epochs: 1, options: {{path: {given}}}}}"
              for name, weight in (("a", "{0: 1, 0.5: 0}"), ("b", "{0: 0, 0.5: 1}"))]  # fmt: skip
    mixture = [f"mixture=[{', '.join(phases)}]", "steps=8", "rows=1"]
    rest = [one for one in rows if not one.startswith(("mixture", "steps", "rows"))]
    code, _, err = run(*rest, *mixture)
    assert (code, "every source that has a weight then has ended" in err) == (2, True), err
    assert [path.name for path in (tmp_path / "out" / "resume").iterdir()] == ["00000002"]
    out = run("plan", *rest[1:], *mixture)[1]
    assert " for 8 steps" in out  # whether rows are left behind is not known


def test_a_full_disk_at_the_end_leaves_no_half_a_model(
    tmp_path: Path, run: Run, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **more: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("modalora.checkpoint.files.save_file", full)
        code, _, err = run(*rows, "save_every=1")
    assert (code, "could not be written, and nothing of it is left: No space left on device" in err) == (1, True), err
    assert not (tmp_path / "out" / "model").exists()
    assert run(*rows, "save_every=1")[0] == 0


def test_a_window_is_refused_where_rows_are_cut_by_it(tmp_path: Path, run: Run, rows: list[str]) -> None:
    assert run(*rows, "window=4096")[0] == 0
    (tmp_path / "rows.jsonl").write_text('{"text": "One, two and three."}\n' * 2)
    code, _, err = run(*rows, "window=4096", f"output={tmp_path / 'other'}")
    assert (code, "window=4096: the model reads at most 1024 tokens" in err) == (2, True)


def test_what_was_learnt_before_too_many_rows_were_bad_is_saved(tmp_path: Path, run: Run, rows: list[str]) -> None:
    lines = [
        json.dumps({"instruction": f"{number}?", "output": "" if number % 9 == 8 else "so"}) for number in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    more = ["steps=25", "quarantine_most=0.003"]
    code, _, err = run(*rows, *more)
    assert (code, "or raise quarantine_most" in err) == (1, True)
    assert [path.name for path in (tmp_path / "out" / "resume").iterdir()] != []
    assert run(*rows, *more, "quarantine_most=0.5")[0] == 0


def test_a_state_of_a_version_that_did_not_know_its_start_is_gone_on_from(
    tmp_path: Path, run: Run, rows: list[str]
) -> None:
    assert run(*rows)[0] == 0
    shutil.rmtree(tmp_path / "out" / "model")
    (path,) = (tmp_path / "out" / "resume").glob("*/state.json")
    fields = json.loads(path.read_text())
    del fields["start"]
    path.write_text(json.dumps(fields))
    (path.parent / "manifest.json").unlink()
    seal(path.parent)
    assert "goes on after step 2" in run(*rows, "steps=4")[2]


def test_gradients_need_not_be_clipped(run: Run, rows: list[str]) -> None:
    assert run(*rows, "optim.clip_norm=.inf")[0] == 0


def test_the_adapters_folder_is_that_of_the_model_beside_it(tmp_path: Path, run: Run, rows: list[str]) -> None:
    assert run(*rows)[0] == 0
    own = tmp_path / "out" / "mine-lora" / "adapter_model.safetensors"
    before = own.read_bytes()
    shutil.rmtree(tmp_path / "out" / "model")
    assert run(*rows, "steps=4")[0] == 0
    assert own.read_bytes() != before
    code, _, err = run(*rows, "steps=2")
    assert (code, "is the finished model of a run with other settings (steps)" in err) == (2, True)
    shutil.rmtree(tmp_path / "out" / "model")
    code, _, err = run(*rows, "steps=2")
    assert (code, "beyond steps=2; raise steps" in err) == (2, True)

    shutil.rmtree(own.parent)
    own.parent.mkdir()
    (own.parent / "note.txt").write_text("mine")
    _, _, err = run(*rows, "steps=4")
    assert "mine-lora is none that training wrote, and stays" in err
    assert [path.name for path in own.parent.iterdir()] == ["note.txt"]
