"""Settings: what is read is what was written, and a wrong key is answered with the right one."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from modalora.config import (
    ExtendConfig,
    FittedRate,
    MediaConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    SearchConfig,
    SourceConfig,
    dump,
    load_run,
    load_stages,
    parse,
)
from modalora.config.recipes import RECIPES
from modalora.config.yaml import read, write
from modalora.errors import ConfigError
from modalora.models.multimodal import ModelConfig
from modalora.models.sizes import SIZES
from modalora.nn.rope import LongRope, Plain

RECIPE: dict[str, Any] = {
    "init": "tiny",
    "output": "out",
    "train": ["decoder"],
    "mixture": [{"source": "books"}],
    "steps": 3,
}


def written(name: str = "tiny") -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(asdict(SIZES[name]())))
    return fields


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[Any], Path]:
    def write(fields: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
        return path

    return write


@pytest.mark.parametrize("name", SIZES)
def test_every_size_survives_json(name: str) -> None:
    config = parse(ModelConfig, written(name), "config.json")
    assert config == SIZES[name]()
    assert type(config.decoder.rope) is type(SIZES[name]().decoder.rope)


def test_plain_and_long_rope_are_told_apart_by_their_keys() -> None:
    fields = written()
    assert isinstance(parse(ModelConfig, fields, "x").decoder.rope, LongRope)
    fields["decoder"]["rope"] = {"theta": 500.0}
    assert parse(ModelConfig, fields, "x").decoder.rope == Plain(theta=500.0)
    fields["decoder"]["rope"] = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert parse(ModelConfig, fields, "x").decoder.rope == LongRope(short_factor=(1.0,) * 8, long_factor=(2.0,) * 8)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("vison", {}, "unknown key 'vison'; did you mean 'vision'?"),
        ("decoder.hiden_size", 1, "unknown key 'decoder.hiden_size'; did you mean 'hidden_size'?"),
        ("decoder.rope.thetta", 1, "unknown key 'decoder.rope.thetta'; did you mean 'theta'?"),
        ("adapters.vision.rnk", 1, "unknown key 'adapters.vision.rnk'; known keys: alpha_pattern, lora_alpha"),
        ("vision.crop", "big", "vision.crop='big': Input should be a valid integer"),
        ("decoder.rope.long_factor", "x", "decoder.rope.long_factor='x': Input should be a valid tuple"),
        ("decoder.rope.long_factor", ["x"], "decoder.rope.long_factor.0='x': Input should be a valid number"),
        ("decoder", 3, "decoder=3: Input should be a dictionary"),
    ],
)
def test_a_wrong_key_or_value_deep_in_a_config_is_named(path: str, value: Any, told: str) -> None:
    fields = inner = written()
    *groups, key = path.split(".")
    for group in groups:
        inner = inner[group]
    inner[key] = value
    with pytest.raises(ConfigError) as error:
        parse(ModelConfig, fields, "config.json")
    assert str(error.value).startswith(f"config.json: {told}")
    assert ";" not in str(error.value).removeprefix(f"config.json: {told}")


def test_a_misspelt_factor_list_is_explained_for_the_rope_that_was_meant() -> None:
    fields = written()
    fields["decoder"]["rope"]["long_facter"] = fields["decoder"]["rope"].pop("long_factor")
    with pytest.raises(ConfigError) as error:
        parse(ModelConfig, fields, "x")
    assert "did you mean 'long_factor'?" in str(error.value)
    assert "short_factor" not in str(error.value)


def test_a_missing_key_is_named() -> None:
    fields = written()
    del fields["decoder"]["vocab_size"]
    with pytest.raises(ConfigError, match=r"^x: decoder\.vocab_size is missing$"):
        parse(ModelConfig, fields, "x")


def test_every_wrong_key_is_told_at_once() -> None:
    fields = written()
    fields["vison"], fields["decoder"]["wide"] = 1, 2
    with pytest.raises(ConfigError, match=r"vison.*; .*wide|wide.*; .*vison"):
        parse(ModelConfig, fields, "x")


def test_a_rule_of_a_config_speaks_for_itself() -> None:
    fields = written()
    fields["decoder"]["rope"]["rotated"] = 2.0
    with pytest.raises(ConfigError, match=r"^x: rotated=2.0 must lie in \(0, 1\]; Phi-4-Mini uses 0.75$"):
        parse(ModelConfig, fields, "x")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stpes": 3}, "unknown key 'stpes'; did you mean 'steps'?"),
        ({"optim": {"lrr": 1}}, "unknown key 'optim.lrr'; did you mean 'lr'?"),
        ({"mixture": [{"source": "books", "wieght": 2}]}, "unknown key 'mixture.0.wieght'; did you mean 'weight'?"),
        ({"steps": 0}, "steps=0: Input should be greater than or equal to 1"),
        ({"objective": "luck"}, "objective='luck'"),
        ({"mixture": []}, "mixture=[]"),
    ],
)
def test_a_wrong_recipe_is_explained(recipe: Callable[[Any], Path], change: dict[str, Any], told: str) -> None:
    path = recipe({**RECIPE, **change})
    with pytest.raises(ConfigError) as error:
        load_run(path)
    assert str(error.value).startswith(f"{path}: {told}")


def test_overrides_reach_into_groups(recipe: Callable[[Any], Path]) -> None:
    run = load_run(
        recipe(RECIPE), ["optim.lr=1e-4", "steps=7", "optim.lr_scale.decoder=0.5", "train=[decoder, 'image.*']"]
    )
    assert run.optim.lr == 1e-4
    assert run.steps == 7
    assert run.optim.lr_scale == {"decoder": 0.5}
    assert run.train == ["decoder", "image.*"]


@pytest.mark.parametrize("override", ["steps", "=3", "steps.x=3", "train=[", "optim.lr.x=1"])
def test_an_override_that_does_not_fit_is_refused(recipe: Callable[[Any], Path], override: str) -> None:
    with pytest.raises(ConfigError):
        load_run(recipe(RECIPE), [override])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\x00"])
def test_a_recipe_that_is_no_mapping_is_refused(recipe: Callable[[Any], Path], text: str) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        load_run(recipe(text))


def test_a_recipe_that_is_absent_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load_run(tmp_path)
    (tmp_path / "scene.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="is a binary file; give a YAML file"):
        load_run(tmp_path / "scene.png")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="is empty; write settings"):
        load_run(tmp_path / "empty.yaml")


def test_modality_files_of_a_recipe_are_seen_from_its_folder_and_those_of_an_override_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package = Path("package")
    package.mkdir()
    for file in ("here.py", "package/beside.py"):
        Path(file).touch()
    own = package / "own.yaml"
    own.write_text(yaml.safe_dump({**RECIPE, "modality_files": ["beside.py", "here.py", "nowhere.py"]}))
    found = ["package/beside.py", "here.py", "package/nowhere.py"]
    assert load_run(own).modality_files == found
    assert load_run(own, ["modality_files=[here.py]"]).modality_files == ["here.py"]
    chain = {"init": "tiny", "output": "out", "stages": [{"recipe": "own.yaml"}]}
    (package / "chain.yaml").write_text(yaml.safe_dump(chain))
    assert load_stages(package / "chain.yaml").runs["own"].modality_files == found
    (package / "chain.yaml").write_text(yaml.safe_dump({**chain, "set": {"modality_files": ["beside.py"]}}))
    assert load_stages(package / "chain.yaml").runs["own"].modality_files == ["package/beside.py"]


def test_a_run_survives_its_own_yaml(recipe: Callable[[Any], Path]) -> None:
    run = parse(RunConfig, RECIPE, "x")
    assert load_run(recipe(dump(run))) == run


def chain_files(folder: Path) -> Path:
    stage = "init: a\noutput: b\ntrain: [decoder]\nmixture: [{source: books}]\nsteps: 9\noptim: {lr: 0.5}\n"
    (folder / "one.yaml").write_text(stage)
    (folder / "two.yaml").write_text(stage)
    chain = folder / "chain.yaml"
    chain.write_text(
        "init: tiny\noutput: out\nset: {rows: 3, optim.lr: 0.25}\nstages:\n"
        "  - {recipe: one.yaml}\n  - {recipe: two.yaml, name: other, set: {steps: 7}}\n"
    )
    return chain


def test_a_stage_of_a_chain_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    runs = load_stages(chain_files(tmp_path), ["window=33", "other.optim.lr=1e-3"]).runs
    assert list(runs) == ["one", "other"]
    assert [(run.init, run.output) for run in runs.values()] == [("tiny", "out/one"), ("out/one/model", "out/other")]
    assert [(run.rows, run.steps, run.window) for run in runs.values()] == [(3, 9, 33), (3, 7, 33)]
    assert [run.optim.lr for run in runs.values()] == [0.25, 0.001]


def test_start_and_folder_of_a_chain_are_set_for_the_chain(tmp_path: Path) -> None:
    runs = load_stages(chain_files(tmp_path), ["init=nano", "output=there", "other.output=elsewhere"]).runs
    assert [(run.init, run.output) for run in runs.values()] == [
        ("nano", "there/one"),
        ("there/one/model", "elsewhere"),
    ]


def test_settings_of_a_stage_may_name_the_folder_of_the_chain(tmp_path: Path) -> None:
    chain = chain_files(tmp_path)
    second = "{recipe: two.yaml, set: {init: '{output}/one/model', take: {'*': '{output}/x'}}}"
    rows = "{mixture: [{source: files, options: {path: ['{output}/a.jsonl']}}]}"
    stages = f"stages: [{{recipe: one.yaml, set: {rows}}}, {second}]\n"
    chain.write_text(f"init: tiny\noutput: out\n{stages}")
    for output in ("out", "runs/mine"):
        one, two = load_stages(chain, [f"output={output}"]).runs.values()
        assert (two.init, two.take, one.output) == (f"{output}/one/model", {"*": f"{output}/x"}, f"{output}/one")
        assert one.mixture[0].options == {"path": [f"{output}/a.jsonl"]}
    nano = load_stages(RECIPES / "chain-nano.yaml", ["output=runs/mine"]).runs
    assert not any("chain-nano" in str(run) for run in nano.values())
    assert load_stages(chain, ["init=nano"]).start == "nano"


def test_a_plain_recipe_is_a_chain_of_one(tmp_path: Path) -> None:
    chain_files(tmp_path)
    assert load_stages(tmp_path / "one.yaml").runs.keys() == {"one"}


def test_a_wrong_chain_says_which_stage(tmp_path: Path) -> None:
    chain = chain_files(tmp_path)
    with pytest.raises(ConfigError, match="takes one of its stages"):
        load_run(chain)
    with pytest.raises(ConfigError, match="stage other: unknown key 'stepps'; did you mean 'steps'"):
        load_stages(chain, ["other.stepps=3"])
    (tmp_path / "two.yaml").unlink()
    with pytest.raises(ConfigError, match="stage 'other': there is no recipe 'two.yaml'"):
        load_stages(chain)
    chain.write_text("init: a\noutput: b\nstages: [{recipe: one.yaml}, {recipe: one.yaml}]\n")
    with pytest.raises(ConfigError, match="two stages have one name"):
        load_stages(chain)


def fields_of_a_run(**more: Any) -> dict[str, Any]:
    basis = {"init": "tiny", "output": "out", "train": ["decoder"], "mixture": [{"source": "books"}], "steps": 100}
    return {**basis, "rows": 4, "accumulate": 2, "window": 128, **more}


def test_a_fitted_rate_falls_with_the_tokens_of_the_run() -> None:
    law = {"lr": 0.002, "tokens": 5e10}
    run = parse(RunConfig, fields_of_a_run(optim={"fitted": law}), "test")
    tokens = 100 * 4 * 2 * 128
    assert run.optim.lr == pytest.approx(0.002 * (tokens / 5e10) ** -0.32)
    # the report's own figure: 5 T tokens take 0.229 of the rate of 50 B
    assert FittedRate(lr=1, tokens=5e10).rate(5e12) == pytest.approx(0.229, abs=5e-4)
    again = parse(RunConfig, run.model_dump(mode="json"), "test")  # a resolved run can be read again
    assert again.optim.lr == run.optim.lr
    with pytest.raises(ConfigError, match="leave one out"):
        parse(RunConfig, fields_of_a_run(optim={"fitted": law, "lr": 0.1}), "test")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("010", 10),
        ("1:40", "1:40"),
        ("1_0", "1_0"),
        ("on", "on"),
        ("2024-01-02", "2024-01-02"),
        ("2024-13-45", "2024-13-45"),
        ("null", None),
        ("~", None),
        ("true", True),
        ("{a: [1, .inf]}", {"a": [1, float("inf")]}),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_plain_values_are_those_of_yaml_1_2_and_survive_being_written(text: str, value: Any) -> None:
    assert read(text, "it") == value
    assert type(read(text, "it")) is type(value)
    assert read(write({"key": [value]}), "it") == {"key": [value]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", r"^x is not YAML: line 3 sets 'a' for the second time$"),
        ("a: {lr: 1, lr: 2}", r"^x is not YAML: line 1 sets 'lr' for the second time$"),
        ("a:\n\tb: 1", r"^x is not YAML: line 2: found character .* start any token; indent with spaces$"),
        ("!!int abc", r"^x is not YAML that settings are made of: invalid literal"),
        ("9" * 5000, r"^x is not YAML that settings are made of: Exceeds the limit"),
        ("[" * 3000, r"^x is not YAML that settings are made of: maximum recursion"),
        ("? [a]\n: 1", r"^x is not YAML: line 1 has a list or a mapping for a key$"),
        ("!!bool abc", r"^x is not YAML that settings are made of: 'abc'$"),
        ("!!python/object:os.system x", r"^x is not YAML: line 1: could not determine a constructor"),
    ],
)
def test_what_is_no_plain_yaml_is_told_in_a_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        read(text, "x")
    assert "\n" not in str(raised.value)


def test_a_setting_that_holds_itself_is_refused(recipe: Callable[[Any], Path]) -> None:
    with pytest.raises(ConfigError, match="a setting holds itself"):
        load_run(recipe(RECIPE), ["preserve=&a [*a]"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps=true", "steps=True must be a number"),
        ("steps=on", "steps='on': Input should be a valid integer"),
        ("optim.lr=true", "optim.lr=True must be a number"),
        ("optim.lr=1e38", "optim.lr=1e.38: Input should be less than or equal to 1000"),
        ("optim.lr_scale={decoder: 1e38}", "optim.lr_scale.decoder=1e.38: .* less than or equal to 1000"),
        ("optim.fitted={lr: 1, tokens: 1, exponent: 5}", r"optim.fitted gives a rate of \S+e\+"),
        ("optim.betas=[true, 0.9]", "optim.betas.0=True must be a number"),
        ("mixture.0.weight=true", "mixture.0.weight=True must be a number"),
        ("output=1e5", "output=100000.0: Input should be a valid string; put it into quotes"),
        ("mixture.\u00b2.weight=1", "nothing can be set at"),
        ("optim.betas=[0.999, 0.99]", None),
        ("optim={betas: [0.9, 0.99], state_bits: 16}", None),
        ("optim={betas: [0.9, 0.991], state_bits: 16}", r"betas\[1\]=0.991 moves a bf16 moment by less"),
        ("optim={betas: [0.999, 0.99], state_bits: 16}", r"betas\[0\]=0.999 moves a first moment of 16 bits"),
        ("optim={betas: [0.97, 0.99], state_bits: 8}", r"betas\[0\]=0.97 .*use 0.95 or less"),
        ("optim.fitted={lr: 1, tokens: 1, exponent: 1000}", "optim.fitted gives a rate of inf"),
        ("optim.fitted={lr: 1, tokens: 1, exponent: -1000}", "optim.fitted gives a rate of 0"),
    ],
)
def test_a_value_that_would_be_taken_for_another_is_refused(
    recipe: Callable[[Any], Path], override: str, told: str | None
) -> None:
    if told is None:
        load_run(recipe(RECIPE), [override])
        return
    with pytest.raises(ConfigError, match=told):
        load_run(recipe(RECIPE), [override])


def test_the_page_of_settings_is_what_the_code_says_and_names_every_key() -> None:
    root = Path(__file__).parents[1]
    written = (root / "docs" / "settings.md").read_text(encoding="utf-8")
    own = runpy.run_path(str(root / "scripts" / "settings.py"))["page"]()
    assert written == own, "write it anew: python scripts/settings.py > docs/settings.md"
    for kind in (RunConfig, OptimConfig, MediaConfig, MeshConfig, SourceConfig, ExtendConfig, SearchConfig):
        assert [name for name in kind.model_fields if f"\n| `{name}` |" not in written] == []
    assert not [line for line in written.splitlines() if line.startswith("| `") and line.endswith("|  |")]
