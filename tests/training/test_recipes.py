from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import soundfile
import torch
from PIL import Image

from modalora.checkpoint.store import load_model
from modalora.checkpoint.write import save_model
from modalora.config import MediaConfig, RunConfig, is_extension, load_extension, load_run, load_stages
from modalora.config.recipes import RECIPES
from modalora.data.sources import SOURCES
from modalora.errors import CheckpointError
from modalora.models.multimodal import Multimodal, part_of
from modalora.models.sizes import SIZES, nano, tiny
from modalora.processing.audio import log_mel
from modalora.processing.tokenizer import TextTokenizer
from modalora.training.run import run_recipe
from modalora.training.start import open_start
from small import fox, write_books

PATHS = sorted(RECIPES.glob("*.yaml"))
EXTENSIONS = [path for path in PATHS if is_extension(path)]
RUNS = {
    f"{path.stem}/{title}": run
    for path in PATHS
    if path not in EXTENSIONS
    for title, run in load_stages(path).runs.items()
} | {path.stem: run for path in EXTENSIONS if (run := load_extension(path).run(rope={}))}

# arXiv:2503.01743, section 3: what each stage trains; all else is frozen. Rates and steps where they are published.
PUBLISHED = {
    "language-1-pretrain": ({"decoder"}, None, None),
    "language-2-posttrain": ({"decoder"}, None, None),
    "vision-1-align": ({"image.projector.vision"}, None, None),
    "vision-2-joint": ({"image.encoder", "image.projector.vision"}, None, None),
    "vision-3-generative": ({"adapter.vision", "image.encoder", "image.projector.vision"}, None, None),
    "vision-4-frames": ({"adapter.vision", "image.projector.vision"}, None, None),
    "speech-1-pretrain": ({"audio.encoder", "audio.projector.speech"}, 4e-5, 50_000),
    "speech-2-posttrain": ({"audio.projector.speech", "adapter.speech"}, 1e-4, 50_000),
    "joint-vision-speech": ({"adapter.vision", "image.encoder", "image.projector.vision"}, None, None),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_names_sources_and_parts_that_exist(name: str) -> None:
    run = RUNS[name]
    assert {source.source for source in run.mixture} <= {"documents", "files", *SOURCES}
    with torch.device("meta"):
        parts = {part_of(parameter) for parameter, _ in Multimodal(nano()).named_parameters()}
    parts |= {f"adapter.{name}" for name in run.adapters}
    for pattern in (*run.train, *run.take, *run.optim.lr_scale, *run.copy_parts, *run.copy_parts.values()):
        assert any(fnmatchcase(part, pattern) for part in parts), pattern


def test_a_recipe_starts_from_models_that_other_recipes_write() -> None:
    written = {f"{run.output}/model" for run in RUNS.values()}
    for run in RUNS.values():
        assert {start for start in (run.init, *run.take.values()) if start not in SIZES} <= written | {"bundled/nano"}


def test_the_stages_of_the_paper_train_what_the_paper_trains() -> None:
    for chain in ("chain-phi4", "chain-nano"):
        runs = load_stages(RECIPES / f"{chain}.yaml").runs
        stages = {title: run for title, run in runs.items() if title in PUBLISHED}
        assert list(stages) == list(PUBLISHED)
        assert {title: set(run.train) for title, run in stages.items()} == {
            title: parts for title, (parts, *_) in PUBLISHED.items()
        }
    for title, (_, rate, steps) in PUBLISHED.items():
        run = load_run(RECIPES / f"{title}.yaml")
        assert rate in (None, run.optim.lr)
        assert steps in (None, run.steps)
    frames = load_run(RECIPES / "vision-4-frames.yaml")
    assert frames.tokens == 64 * 1024


# crops of a picture, seconds of a sound: arXiv:2503.01743, 3.2; the card recommends sounds up to 40 s, summaries apart
LIMITS = {
    "vision-1-align": (16, None),
    "vision-2-joint": (16, None),
    "vision-3-generative": (36, None),
    "vision-4-frames": (36, None),
    "speech-1-pretrain": (None, 40),
    "speech-2-posttrain": (None, 1800),
    "joint-vision-speech": (36, 40),
}


def test_the_stages_of_the_paper_read_media_up_to_the_published_sizes() -> None:
    found = {title: load_run(RECIPES / f"{title}.yaml") for title in PUBLISHED}
    media = {title: (run.media.max_crops, run.media.max_seconds) for title, run in found.items()}
    assert media == dict.fromkeys(PUBLISHED, (None, None)) | LIMITS
    own = {source.name: source.media for source in found["speech-2-posttrain"].mixture}
    assert own.pop("summaries") == MediaConfig()
    assert own == dict.fromkeys(
        ("recognition", "translation", "questions", "understanding"), MediaConfig(max_seconds=30)
    )
    others = [run for title, run in found.items() if title != "speech-2-posttrain"]
    assert {source.media.max_seconds for run in others for source in run.mixture} == {None}


def test_the_rate_of_pretraining_falls_to_the_published_share_at_five_trillion_tokens() -> None:
    run = load_run(RECIPES / "language-1-pretrain.yaml")
    assert run.steps * run.step_tokens == pytest.approx(5e12, rel=1e-4)
    assert run.optim.fitted is not None
    assert run.optim.lr / run.optim.fitted.lr == pytest.approx(0.229, abs=5e-4)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of all kinds that the stages read: text, a picture, several, a sound, a picture with a sound."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (90, 130, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(16_000), 16_000)
    media = [[], ["image"], ["image", "image"], ["audio"], ["image", "audio"]]
    lines = []
    for number in range(20):
        parts = [
            {"type": kind, kind: f"{number % 3}.{'png' if kind == 'image' else 'wav'}"} for kind in media[number % 5]
        ]
        content = [*parts, {"type": "text", "text": f"What is in it, number {number}?"}]
        answer = {"role": "assistant", "content": f"Something that I call number {number}."}
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def test_the_chain_of_the_paper_runs_at_nano_size_and_each_stage_changes_its_parts_alone(
    conversations: Path, tmp_path: Path
) -> None:
    small = [
        f"mixture=[{{source: files, options: {{path: {conversations}}}}}]", "steps=2", "accumulate=1", "save_every=100",
        "optim.warmup_steps=0", "precision=fp32", "threads=1",
    ]  # fmt: skip
    stages = load_stages(RECIPES / "chain-phi4.yaml", small).runs
    before, start = "bundled/nano", "bundled/nano"
    for title, run in stages.items():
        own = run.model_copy(
            update={"init": before, "output": str(tmp_path / title), "cache": str(tmp_path / "cache"), "window": 64}
            | ({"rows": 5} if not run.tokens else {"tokens": 1000})
        )
        folder = run_recipe(own)
        assert changed_parts(start, folder) == PUBLISHED[title][0] | set(run.copy_parts), title
        before = start = str(folder)


def changed_parts(start: str, folder: Path) -> set[str]:
    from modalora.checkpoint.find import find_model

    one, other = load_model(find_model(start.removeprefix("bundled/"))).model, load_model(folder).model
    after = other.state_dict()
    return {part_of(name) for name, tensor in one.state_dict().items() if not torch.equal(tensor, after[name])}


def test_the_recipe_of_mixed_windows_runs_at_a_tiny_size(tmp_path: Path) -> None:
    for name, words in (("short", 20), ("long", 400)):
        texts = [f"{name} " + " ".join(f"word{(text * step) % 97}" for step in range(words)) for text in range(40)]
        (tmp_path / name).mkdir()
        parquet.write_table(arrow.table({"text": texts}), tmp_path / name / "texts.parquet")
    write_books(tmp_path, 4 * " ".join(f"word{number}" for number in range(97)))  # for the tokenizer
    small = [
        "init=tiny", "steps=3", "tokens=768", "accumulate=2", "threads=1", "log_every=1", f"data={tmp_path}",
        f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", "rope.window=768", "rope.original_window=256",
        "rope.short_factor=[1, 1, 1, 1, 1, 1]", "rope.long_factor=[1, 1.5, 2, 3, 3, 4]", "mixture.0.window=256",
        f"mixture.0.options.path={tmp_path}/short/*.parquet", "mixture.1.window=768",
        f"mixture.1.options.path={tmp_path}/long/*.parquet", "mixture.1.options.least=300", "optim.warmup_steps=0",
    ]  # fmt: skip
    folder = run_recipe(load_run(RECIPES / "extend-mixed.yaml", small))
    told = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    kinds = [sum(line[f"tokens_{kind}_rows"] for line in told) for kind in ("short", "long")]
    assert min(kinds) > 0
    assert kinds[1] % 768 == 0
    assert [line["lr"] for line in told] == pytest.approx([2e-5, 1.5e-5, 0.5e-5])  # (1 + cos(pi n / 3)) / 2
    assert load_model(folder).model.config.decoder.rope.window == 768


def test_the_base_recipe_runs_from_books_to_a_model_folder(tmp_path: Path) -> None:
    text = "".join(
        f"The {word} went home on day {day}.\n\n" for day in range(200) for word in ("cat", "dog", "old man")
    )
    write_books(tmp_path, text)
    small = [
        "init=tiny",
        "steps=2",
        "rows=2",
        "accumulate=1",
        "window=16",
        f"data={tmp_path}",
        f"cache={tmp_path / 'cache'}",
        "optim.warmup_steps=0",
    ]
    run: RunConfig = load_run(RECIPES / "nano-1-base.yaml", [*small, f"output={tmp_path / 'out'}"])
    folder = run_recipe(run)
    loaded = load_model(folder)
    assert loaded.notes["last"]["step"] == 2
    assert (folder.parent / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert run_recipe(run) == folder  # a finished run is not run again


def test_data_that_changed_after_a_run_are_told(tmp_path: Path) -> None:
    for file in (Path(__file__).parents[2] / "examples" / "finetune").iterdir():
        shutil.copy(file, tmp_path)
    rows, told = tmp_path / "rows.jsonl", list[str]()
    start = [f"mixture.0.options.path={rows}", f"output={tmp_path / 'out'}", "steps=1", "log_every=1"]
    run = load_run(RECIPES / "finetune-media.yaml", start)
    folder = run_recipe(run)
    run_recipe(run, say=told.append)
    assert told == []
    later = (folder / "config.json").stat().st_mtime + 5
    os.utime(rows, (later, later))
    run_recipe(run, say=told.append)
    assert told == [f"{rows} has changed since; remove {folder.parent} to train on it anew"]
    shutil.rmtree(folder)
    run_recipe(run.model_copy(update={"steps": 2}), say=told.append)
    assert f"{rows} has changed since that state; its rows are read as they are now" in told


def test_a_decoder_is_not_taken_from_a_model_of_other_tokens(tmp_path: Path) -> None:
    for name, letters in (("one", "the quick brown fox jumps over the lazy dog. "), ("two", "seven blue boxes, 77. ")):
        save_model(Multimodal(tiny()), TextTokenizer.train([letters * 8], 320), tmp_path / name)
    run = RUNS["finetune-text/finetune-text"].model_copy(update={"init": str(tmp_path / "one"), "adapters": {}})
    open_start(run.model_copy(update={"take": {"decoder": str(tmp_path / "one")}}))
    with pytest.raises(CheckpointError, match="the decoder of .*two was trained on other tokens than those of `init`"):
        open_start(run.model_copy(update={"take": {"decoder": str(tmp_path / "two")}}))
    open_start(run.model_copy(update={"take": {"image.*": str(tmp_path / "two")}}))


def test_adapters_come_along_with_the_decoder_they_were_trained_on(tmp_path: Path) -> None:
    words = fox()
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        save_model(Multimodal(tiny()), words, tmp_path / name)
    run = RUNS["finetune-text/finetune-text"].model_copy(update={"init": str(tmp_path / "one"), "adapters": {}})
    with pytest.raises(CheckpointError, match="'adapter.vision' of .*two was trained on another base model"):
        open_start(run.model_copy(update={"take": {"adapter.vision": str(tmp_path / "two")}}))
    model, *_ = open_start(run.model_copy(update={"take": {"*": str(tmp_path / "two")}}))
    given = load_model(tmp_path / "two").model.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("parts", ["audio.encoder", "audio.*"])
def test_a_fresh_sound_encoder_that_trains_is_given_the_mean_of_its_sounds(
    conversations: Path, tmp_path: Path, parts: str
) -> None:
    torch.manual_seed(0)
    save_model(Multimodal(tiny()), TextTokenizer.train([conversations.read_text()], 320), tmp_path / "start")
    small = [
        f"init={tmp_path / 'start'}", f"train=[{parts}, audio.projector.*]", "steps=1", "optim.warmup_steps=0",
        f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", "adapters={}", "precision=fp32",
        f"mixture=[{{source: files, options: {{path: {conversations}}}}}]", "threads=1",
    ]  # fmt: skip
    encoder = load_model(run_recipe(load_run(RECIPES / "finetune-media.yaml", small))).model.encoders["audio"]
    waves = [soundfile.read(path)[0] for path in conversations.parent.glob("*.wav")]
    mels = encoder.global_mean.numel()
    means = torch.stack([log_mel(wave.astype(np.float32), 16_000, mels=mels).mean(0) for wave in waves])
    least, most = means.amin(0) - 1e-4, means.amax(0) + 1e-4  # clips are of one length, and drawn unequally often
    assert bool(((encoder.global_mean >= least) & (encoder.global_mean <= most)).all())
    assert 0.5 < encoder.global_invstd.min() < encoder.global_invstd.max() <= 1
