"""`modalora extend` from a recipe to its report, on a model so small that all of it takes seconds."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from modalora.assistant import Assistant, make_processor
from modalora.checkpoint.store import load_model
from modalora.config import ExtendConfig, load_extension, load_run
from modalora.config.recipes import RECIPES
from modalora.contracts import Batch, Route
from modalora.errors import ConfigError, DataError
from modalora.longrope2.extend import extend
from modalora.longrope2.factors import read_factors
from modalora.longrope2.judges import NeedleJudge
from modalora.longrope2.plan import plan_extension
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.nn.rope import LongRope
from modalora.processing.tokenizer import TextTokenizer
from modalora.training.plan import plan_run
from small import write_books

Run = Callable[..., tuple[int, str, str]]
WORDS = "the old man went home with a small dog and never came back to see what was left of it".split()
TEXTS = [
    "\n\n".join(
        " ".join(WORDS[(book + place * line) % len(WORDS)] for place in range(1, 12)).capitalize() + "."
        for line in range(1, 90)
    )
    for book in range(4)
]  # fmt: skip

# Extended before, as published Phi models are: short rows have divisors and an attention factor of their own.
SHORT = (1.0, 1.05, 1.02, 1.3, 1.5, 2.0)
TINY = tiny()
SIZES = replace(TINY, decoder=replace(TINY.decoder, rope=replace(TINY.decoder.rope, short_factor=SHORT)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and books."""
    folder = tmp_path_factory.mktemp("place")
    for split in ("train", "validation"):
        write_books(folder, *TEXTS, split=split)
    torch.manual_seed(0)
    Assistant(Multimodal(SIZES).eval(), make_processor(SIZES, TextTokenizer.train(TEXTS, 320))).save(folder / "base")
    return folder


def recipe(place: Path, output: Path, **changes: Any) -> dict[str, Any]:
    sources = [
        {"source": "documents", "name": "short", "weight": 0.44, "window": 256, "options": {"rows": "short"}},
        {"source": "documents", "name": "long", "weight": 0.56, "window": 512, "options": {"rows": "long"}},
    ]
    training = {
        "train": ["decoder"], "mixture": sources, "weigh": "tokens", "tokens": 512, "steps": 3, "precision": "fp32",
        "optim": {"lr": 1e-3, "warmup_steps": 0}, "save_every": 1, "log_every": 1,
    }  # fmt: skip
    return {
        "kind": "extend", "init": str(place / "base"), "output": str(output), "target": 512,
        "guide": {"documents": 3}, "search": {"population": 4, "iterations": 1}, "training": training,
        "scores": {"documents": 2, "depths": [0.0, 1.0], "methods": ["none", "yarn", "longrope2"],
                   "lengths": [384, 512]},
        "data": str(place), "cache": str(place / "cache"), **changes,
    }  # fmt: skip


def settings(place: Path, output: Path, **changes: Any) -> ExtendConfig:
    return ExtendConfig.model_validate(recipe(place, output, **changes))


@pytest.fixture(scope="module")
def extended(place: Path) -> Path:
    extend(settings(place, place / "out"))
    return place / "out"


def test_it_leaves_factors_a_model_scores_pictures_and_a_report(extended: Path) -> None:
    factors, source = read_factors(extended / "factors.json")
    assert (factors.window, factors.target, len(factors.long)) == (256, 512, 6)
    assert source.evaluations > 0
    model = load_model(extended / "train" / "model").model
    rope = model.config.decoder.rope
    assert isinstance(rope, LongRope)
    assert (rope.long_factor, rope.window, rope.original_window) == (factors.long, 512, 256)
    for name in ("factors", "search", "by_length", "needles"):
        assert (extended / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((extended / "summary.json").read_text())
    assert summary["theoretical_critical_pair"] == 3  # ceil(6 ln(256 / 2 pi) / ln 10000)
    assert [*summary["scores"]] == [
        "no rescaling", "YaRN", "LongRoPE2", "LongRoPE2, trained", "LongRoPE2, trained, always long",
    ]  # fmt: skip
    for cells in summary["scores"].values():
        assert [(cell["length"], cell["count"]) for cell in cells] == [(384, 2), (512, 2)]


def test_short_rows_are_those_of_the_model_before_to_the_last_bit(place: Path, extended: Path) -> None:
    base = load_model(place / "base").model.eval()
    rope = load_model(extended / "train" / "model").model.config.decoder.rope
    assert base.config.decoder.rope.attention_factor() != 1.0 != rope.attention_factor(long=True)
    ids, lengths = torch.arange(2 * 257).view(2, 257) % 320, torch.tensor([256, 257])
    before = base(Batch(ids, lengths, Route((None, None))))
    base.set_rope(rope)
    after = base(Batch(ids, lengths, Route((None, None))))
    assert torch.equal(before[0, :256], after[0, :256])
    assert not torch.equal(before[1], after[1])


def test_one_attention_factor_for_all_rows_is_written_for_transformers(
    place: Path, extended: Path, tmp_path: Path
) -> None:
    base = load_model(place / "base").model.config.decoder.rope
    with pytest.raises(ConfigError, match=r"modalora extend`: search\.short_temperature=same"):
        read_factors(extended / "factors.json")[0].rope(base).to_hf()
    search = {"population": 4, "iterations": 0, "short_temperature": "same"}
    scores = {"documents": 1, "methods": ["yarn", "longrope2"], "lengths": [512]}
    extend(settings(place, tmp_path / "out", training=None, search=search, scores=scores))
    told = read_factors(tmp_path / "out" / "factors.json")[0].rope(base).to_hf()["rope_parameters"]
    assert (told["short_factor"], "attention_factor" in told) == ([*SHORT], False)  # which follows from the windows


def test_the_report_needs_no_other_file_and_shows_every_factor(extended: Path) -> None:
    page = (extended / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64,") == 4
    factors, _ = read_factors(extended / "factors.json")
    for value in factors.long:
        assert f"<td>{value:.6g}</td>" in page
    assert "default-src 'none'" in page


def test_a_finished_extension_is_not_repeated(place: Path, extended: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in extended.rglob("*") if path.is_file() and "scores" in path.parts}
    kept |= {path: path.stat().st_mtime_ns for path in (extended / "factors.json", extended / "search/search.jsonl")}
    told: list[str] = []
    extend(settings(place, extended), told.append)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not any("measuring" in line or "searching" in line for line in told)


class Killed(BaseException):
    """Stands for a process that ends."""


def test_killed_in_every_stage_and_run_again_it_comes_to_the_same(place: Path, extended: Path, tmp_path: Path) -> None:
    """What a killed process leaves is what its files are at that moment."""
    out = tmp_path / "out"

    def carry_out(moment: str) -> None:
        def die(line: str) -> None:
            if moment in line:
                raise Killed

        extend(settings(place, out), die, lambda metrics: die(f"step {metrics['step']}"))

    for moment in ("iteration 0", "iteration 1", "factors.json", "step 2", "measuring YaRN", "measuring the trained"):
        with pytest.raises(Killed):
            carry_out(moment)
    carry_out("never")
    files = ("factors.json", "scores/trained-reference.json", "scores/longrope2.json", "train/model/model.safetensors")
    for name in files:
        assert (out / name).read_bytes() == (extended / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"search": {"population": 6, "iterations": 1}}, r"other settings \(search.population\)"),
        ({"target": 1024}, r"other settings \(target\)"),
        ({"scores": {"documents": 3}}, r"other settings \(scores.depths, scores.documents, .*remove [^,]*scores$"),
    ],
)
def test_results_of_other_settings_are_never_overwritten(
    place: Path, extended: Path, changes: dict[str, Any], told: str
) -> None:
    before = (extended / "factors.json").read_bytes()
    with pytest.raises(ConfigError, match=told):
        extend(settings(place, extended, **changes))
    assert (extended / "factors.json").read_bytes() == before


def test_a_model_that_is_trained_on_is_measured_anew(place: Path, extended: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(extended, out)
    shutil.rmtree(out / "train" / "model")
    longer = {**recipe(place, out)["training"], "steps": 5}
    told: list[str] = []
    summary = extend(settings(place, out, training=longer), told.append)
    assert sum("measuring the trained model" in line for line in told) == 1
    before, after = (json.loads((one / "scores" / "trained-reference.json").read_text()) for one in (extended, out))
    assert before["made_with"]["weights"] != after["made_with"]["weights"]
    title = "LongRoPE2, trained"
    assert summary["scores"][title] != json.loads((extended / "summary.json").read_text())["scores"][title]


@pytest.fixture
def copied(extended: Path, tmp_path: Path) -> Path:
    """A finished extension of one's own."""
    shutil.copytree(extended, tmp_path / "out")
    return tmp_path / "out"


def test_a_longer_search_names_at_once_all_that_must_go(place: Path, copied: Path) -> None:
    before = (copied / "extend.yaml").read_text()
    longer = settings(place, copied, search={"population": 4, "iterations": 3})
    everything = [copied / "factors.json", copied / "train", copied / "scores"]
    with pytest.raises(ConfigError, match="remove {}, {} and {}, and the search".format(*everything)):
        extend(longer)
    assert (copied / "extend.yaml").read_text() == before  # what is refused changes nothing
    everything[0].unlink()
    shutil.rmtree(copied / "train" / "model")  # a training that has not ended is of these factors, too
    with pytest.raises(
        ConfigError,
        match=r"train was trained with other factors .* remove {}, or give".format("{} and {}".format(*everything[1:])),
    ):
        extend(longer)
    for folder in everything[1:]:
        shutil.rmtree(folder)
    assert extend(longer)["trained"]


def test_a_finished_training_that_is_refused_leaves_the_settings_as_they_are(place: Path, copied: Path) -> None:
    before = (copied / "extend.yaml").read_text()
    longer = {**recipe(place, copied)["training"], "steps": 5}
    with pytest.raises(ConfigError, match="remove .*model to train on"):
        extend(settings(place, copied, training=longer))
    assert (copied / "extend.yaml").read_text() == before


def test_the_search_tells_of_the_methods_that_are_compared_now(place: Path, copied: Path) -> None:
    before = json.loads((copied / "summary.json").read_text())["search"]["others"]
    assert [*before] == ["none", "yarn"]
    shutil.rmtree(copied / "scores")
    scores = {**recipe(place, copied)["scores"], "methods": ["linear", "yarn", "longrope2"]}
    found = extend(settings(place, copied, scores=scores))["search"]["others"]
    assert ([*found], found["yarn"]) == (["linear", "yarn"], before["yarn"])
    assert json.loads((copied / "search" / "outcome.json").read_text())["others"] == found
    scores["methods"] = ["longrope2"]
    shutil.rmtree(copied / "scores")
    assert extend(settings(place, copied, scores=scores))["search"]["others"] == {}


@pytest.mark.parametrize(
    ("name", "method"), [("summary.json", "write_text"), ("search.png", "write_bytes"), ("report.html", "write_text")]
)
def test_a_disk_that_is_full_leaves_each_page_as_it_was(
    place: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    before, whole = (copied / name).read_bytes(), getattr(Path, method)

    def half(path: Path, content: Any, **options: Any) -> None:
        is_meant = name.partition(".")[0] in path.name
        whole(path, content[: len(content) // 2] if is_meant else content, **options)
        if is_meant:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, method, half)
    with pytest.raises(OSError, match="No space left"):
        extend(settings(place, copied))
    assert (copied / name).read_bytes() == before
    assert not [path for path in copied.iterdir() if ".draft" in path.name]


def test_whole_texts_are_not_called_needles(place: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "recipe.yaml"
    scores = {"documents": 1, "lengths": [512], "methods": ["longrope2"]}
    changes = {"training": None, "scores": scores, "guide": {"documents": 2, "score": "text"}}
    path.write_text(yaml.safe_dump(recipe(place, tmp_path / "out", **changes)))
    code, out, err = run("extend", str(path))
    assert code == 0, err
    page = (tmp_path / "out" / "report.html").read_text()
    for told in (out, page):
        assert "perplexity of whole texts" in told
        assert "needle perplexity" not in told
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["search"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-15)


def test_processes_that_cannot_share_the_training_are_told_the_setting(place: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(place, tmp_path / "out")))
    code, _, err = run("extend", str(path), "--processes", "2")
    assert (code, "such as training.accumulate=2" in err) == (2, True)


def test_an_empty_folder_of_scores_holds_no_results(place: Path, extended: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(extended, out)
    for path in (out / "scores").iterdir():
        path.unlink()
    fewer = {**recipe(place, out)["scores"], "methods": ["none"]}
    assert "LongRoPE2" not in extend(settings(place, out, scores=fewer))["scores"]


def test_scores_of_other_factors_are_noticed(place: Path, extended: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(extended, out)
    (out / "extend.yaml").unlink()  # what follows is no longer seen by the settings
    fields = json.loads((out / "scores" / "longrope2.json").read_text())
    fields["made_with"]["factors"][-1] += 0.01
    (out / "scores" / "longrope2.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"longrope2\.json was measured with other factors"):
        extend(settings(place, out, training=None))


def test_altered_results_are_told(place: Path, extended: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(extended, out)
    whole = json.loads((out / "scores" / "yarn.json").read_text())
    (out / "scores" / "yarn.json").write_text(json.dumps({"made_with": whole["made_with"]}))
    with pytest.raises(ConfigError, match=r"yarn\.json was altered: it holds no whole grid; remove it"):
        extend(settings(place, out))
    (out / "search" / "outcome.json").write_text('{"loss": 1}')
    with pytest.raises(ConfigError, match=r"outcome\.json was altered: it has no anchor, best, .*; remove it"):
        extend(settings(place, out))


def test_factors_that_no_search_found_are_not_told_with_its_perplexity(place: Path, copied: Path) -> None:
    before = (copied / "factors.json").read_bytes()
    fields = json.loads(before)
    fields["factors"]["long"][-1] = 50.0
    (copied / "factors.json").write_text(json.dumps(fields))
    shutil.rmtree(copied / "scores")
    shutil.rmtree(copied / "train")
    with pytest.raises(
        ConfigError, match=r"factors\.json was altered: its factors are not those that the search found .*; remove"
    ):
        extend(settings(place, copied))
    (copied / "factors.json").unlink()
    extend(settings(place, copied))
    assert (copied / "factors.json").read_bytes() == before


def test_another_model_under_the_same_name_is_noticed(place: Path, extended: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    processor = make_processor(SIZES, TextTokenizer.train(TEXTS, 320))
    base = tmp_path / "base"
    Assistant(Multimodal(SIZES).eval(), processor).save(base)
    out = tmp_path / "out"
    shutil.copytree(extended, out)
    fields = yaml.safe_load((out / "extend.yaml").read_text())
    (out / "extend.yaml").write_text(yaml.safe_dump({**fields, "init": str(base)}))
    with pytest.raises(ConfigError, match="was found with another model"):
        extend(settings(place, out, init=str(base)))


def in_one_of_two(place: Path, out: Path) -> dict[str, Any]:
    return extend(settings(place, out, training=None, scores={"documents": 1, "lengths": [512], "methods": ["yarn"]}))


def test_two_processes_find_what_one_finds(
    place: Path, extended: Path, tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    first, second = ranks(2, in_one_of_two, place, tmp_path / "out")
    assert (first["anchor"], second) == (json.loads((extended / "summary.json").read_text())["anchor"], {})
    assert read_factors(tmp_path / "out" / "factors.json")[0] == read_factors(extended / "factors.json")[0]


def test_without_training_it_ends_with_factors(place: Path, tmp_path: Path) -> None:
    scores = {"documents": 1, "methods": ["longrope2"], "lengths": [512]}
    found = extend(settings(place, tmp_path / "out", training=None, scores=scores))
    assert found["trained"] is None
    assert not (tmp_path / "out" / "train").exists()


def test_documents_and_data_that_are_not_there_are_told_before_anything_is_searched(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"scores.lengths=\[\], .* \[128, 256, 512\]: 128 tokens are too few"):
        extend(settings(place, tmp_path / "out", scores={"documents": 1}))  # from half the window on
    lost = recipe(place, tmp_path)["training"] | {"mixture": [{"source": "files", "options": {"path": "no.jsonl"}}]}
    with pytest.raises(DataError, match=r"no\.jsonl"):
        extend(settings(place, tmp_path / "out", training=lost))
    assert not (tmp_path / "out" / "search").exists()


def test_the_command_reports_what_it_found(place: Path, extended: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(place, extended)))
    code, out, err = run("extend", str(path))
    assert code == 0, err
    assert "critical pair: 3 in theory" in out
    assert "factors are there" in err
    code, out, _ = run("extend", str(path), "--json")
    assert json.loads(out)["target"] == 512


def test_ctrl_c_in_the_search_exits_with_130_and_keeps_what_was_judged(
    place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, whole = [0], NeedleJudge.losses

    def broken_off(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return whole(*arguments)

    monkeypatch.setattr(NeedleJudge, "losses", broken_off)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(place, tmp_path / "out", training=None)))
    code, _, err = run("extend", str(path))
    assert (code, "the same search goes on from there" in err) == (130, True)
    assert len((tmp_path / "out" / "search" / "search.jsonl").read_text().splitlines()) == 2  # what it is, one answer


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": 200}, "target=200 must be longer than the trained window of 256"),
        ({"training": {"steps": 1}}, "training: .*train is missing"),
        ({"training": {"output": "x"}}, "training: output is set by the extension itself"),
        ({"scores": {"lengths": [4096]}}, r"scores.lengths=\[4096\] must not exceed target=512"),
        ({"guide": {"depth": [0]}}, "unknown key 'guide.depth'; did you mean 'depths'"),
        ({"guide": {"needles": 1000}}, "guide.needles=1000: Input should be less"),
        ({"scores": {"lengths": [0]}}, "scores.lengths.0=0: Input should be greater"),
        ({"scores": {"methods": []}, "training": None}, r"scores.methods=\[\]: without training"),
        ({"search": {"seed": -1}}, "search.seed=-1: Input should be greater"),
        ({"search": {"method": "random", "crossover": 0.5}}, "crossover=0.5: method=random makes no child of two"),
        ({"search": {"racing": False, "race_from": 8}}, "race_from=8 is for racing: true"),
        ({"search": {"anchor": 6}}, "anchor=6"),
        ({"device": "foo"}, "device='foo' cannot be used"),
    ],
)
def test_wrong_settings_are_told_with_exit_code_2_and_nothing_is_written(
    place: Path, tmp_path: Path, run: Run, changes: dict[str, Any], told: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(place, tmp_path / "out", **changes)))
    code, _, err = run("extend", str(path))
    assert code == 2
    assert re.search(told, err), err
    assert not (tmp_path / "out").exists()


def test_recipes_of_one_kind_are_not_those_of_the_other(run: Run) -> None:
    code, _, err = run("extend", "nano-1-base")
    assert (code, "is no recipe of kind extend" in err) == (2, True)
    code, _, err = run("train", "extend-study")
    assert (code, "`modalora extend` carries it out" in err) == (2, True)


@pytest.mark.parametrize("command", [("extend-study", "init=window-study"), ("extend-phi4-mini",)])
def test_a_bundled_recipe_is_planned(command: tuple[str, ...], run: Run) -> None:
    code, out, err = run("plan", *command, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["evaluations"] == 64 + 40 * 32
    assert found["short_share"] == pytest.approx(0.44)
    assert [(own["machine"], own["count"]) for own in found["hours"]] == [("h100", 1), ("h100", 8)]
    one, eight = (own["search"] for own in found["hours"])
    assert one == pytest.approx(8 * eight)


def test_a_plan_without_its_model_names_the_sizes_that_can_stand_in(run: Run) -> None:
    code, _, err = run("plan", "extend-study", "output=nowhere")
    assert (code, "init=window-study" in err) == (2, True)


def test_the_plan_of_phi4_mini_is_what_its_sizes_say(run: Run) -> None:
    found = json.loads(run("plan", "extend-phi4-mini", "--json")[1])
    assert (found["critical"], found["ten_turns"], found["parameters"]) == (34, 22, 3_836_021_760)
    # matrices of 32 layers, 2 per number and token; causal half of 4 x width per pair of tokens; 7 answers
    inner = 32 * (3072 * (24 + 16) * 128 + 3072 * 3072 + 3 * 3072 * 8192)
    tokens = 131_072
    flops = 2 * inner * tokens + 2 * 32 * 3072 * tokens**2 + 2 * 7 * 3072 * 200_064
    assert found["document_flops"] == pytest.approx(flops)
    assert found["plain_search_flops"] == pytest.approx(flops * 10 * 1344)


def test_the_plan_of_an_extension_and_of_its_training_tell_the_same_work() -> None:
    changes = ["init=window-study", "target=32768", "scores.lengths=[]", "training.tokens=32768"]
    windows = ["training.mixture.0.window=128", "training.mixture.1.window=32768", "training.accumulate=9"]
    config = load_extension(RECIPES / "extend-phi4-mini.yaml", [*changes, *windows])
    rope = {"kind": "plain", "window": 32768}
    training, rows = plan_run(config.run(rope=rope))
    assert "rows of text=32768 and text=128 in their shares, as its data were not opened" in rows
    assert training.tokens == 9 * 32768
    # seen 0.5 % apart; short rows taken for long ones were 40 %, and layers that are not counted again 20 %
    found = plan_extension(config, [("h100", 1)], 0.4)
    assert found.training_flops == pytest.approx(training.flops * config.run(rope=rope).steps, rel=0.02)


@pytest.mark.parametrize("pattern", ["*", "decod*"])
def test_a_pattern_that_holds_the_decoder_is_planned_as_its_name_is(pattern: str) -> None:
    recipe = RECIPES / "extend-phi4-mini.yaml"
    by_name, by_pattern = (
        plan_extension(load_extension(recipe, [f'training.train=["{train}"]']), [], 0.4).training_flops
        for train in ("decoder", pattern)
    )
    assert by_pattern == by_name


def test_the_published_schedule_is_the_recipe() -> None:
    mixed = load_run(RECIPES / "extend-mixed.yaml")
    inner = load_extension(RECIPES / "extend-phi4-mini.yaml").run(rope=mixed.rope)
    for own in (mixed, inner):
        assert (own.optim.name, own.optim.betas, own.optim.weight_decay, own.optim.clip_norm) == (
            "adamw", (0.9, 0.95), 0, 1,
        )  # fmt: skip
        assert (own.optim.lr, own.optim.warmup_steps, own.optim.schedule, own.optim.final_lr_ratio) == (
            2e-5, 40, "cosine", 0,
        )  # fmt: skip
        assert own.steps * own.step_tokens == pytest.approx(9.44e9, rel=1e-3)
        assert own.accumulate == 32
