"""From a model and a target window to a factors file, an extended model, scores, pictures and a report.

Stages follow each other and keep what they made: search -> factors.json, training -> train/model, scores/NAME.json,
report.html. A stage that is there is not repeated; search and training also go on within. What was made with other
settings is never overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import exp
from pathlib import Path
from typing import Any

import torch

from modalora.assistant import check_device
from modalora.checkpoint.adapters import fingerprint
from modalora.checkpoint.files import weights_digest
from modalora.checkpoint.resume import locked
from modalora.checkpoint.store import load_model
from modalora.config import ExtendConfig, NeedleConfig, RunConfig, SourceConfig, dump, load_extension, load_run
from modalora.disk import drafted, read_json, write_json
from modalora.errors import ConfigError, DataError
from modalora.evaluation.documents import make_documents, part_of_books
from modalora.evaluation.needle import Document, Grid, measure_grid, plain_document
from modalora.longrope2.factors import (
    Factors,
    Provenance,
    Stretch,
    read_factors,
    temperature_scale,
    write_factors,
)
from modalora.longrope2.judges import NeedleJudge, Surrogate
from modalora.longrope2.methods import TITLES, other_methods
from modalora.longrope2.pictures import draw_by_length, draw_factors, draw_needles, draw_search
from modalora.longrope2.report import as_page
from modalora.longrope2.search import Outcome, search
from modalora.longrope2.space import space_of
from modalora.models.multimodal import Multimodal
from modalora.nn.rope import Regime, Rope
from modalora.parallel import ranks
from modalora.parallel.stops import is_one_of_many
from modalora.processing.tokenizer import TextTokenizer
from modalora.training.audit import check_settings
from modalora.training.loop import Metrics
from modalora.training.run import run_recipe
from modalora.training.start import make_mixture, open_context, open_start
from modalora.training.states import FREE

Say = Callable[[str], None]

FACTORS, SETTINGS, SUMMARY, REPORT = "factors.json", "extend.yaml", "summary.json", "report.html"
MEASURES = {"answers": "needle perplexity", "text": "perplexity of whole texts"}  # by guide.score
TRAINED = {"reference": "trained", "long": "trained, always long"}  # titles of the trained model's grids
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# stage -> settings that its results depend on, and where they are; what follows a stage depends on it too
_STAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "search": (("init", "target", "guide", "search", "dtype"), "search"),
    "training": (("training",), "train"),
    "scores": (("scores",), "scores"),
}


@dataclass(frozen=True)
class Extension:
    """What an extension has to work with. base: the rotary positions that the model came with."""

    config: ExtendConfig
    folder: Path
    device: torch.device  # of this process
    model: Multimodal
    tokenizer: TextTokenizer
    base: Rope
    stretch: Stretch


def extend(
    config: ExtendConfig,
    say: Say = lambda line: None,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Carry out a recipe of kind extend and return its summary, which is also OUTPUT/summary.json.

    say: told in words what happens. report: called with the metrics of training. Raises ConfigError for settings that
    do not fit the model and for an output of other settings, DataError, Interrupted when stopped: the same call goes
    on from there. Of several processes that a launcher started, all search and train; the first one does the rest, and
    the others return an empty summary.
    """
    check_device(config.device)
    with ranks.joined():
        device = torch.device(config.device)
        if is_one_of_many():
            device = ranks.join(config.device, config.patience_seconds)
        if not ranks.is_first():
            say, report = lambda line: None, lambda metrics: None
        return _carry_out(config, device, say, report)


def _carry_out(
    config: ExtendConfig, device: torch.device, say: Say, report: Callable[[Metrics], None]
) -> dict[str, Any]:
    folder = Path(config.output)
    _check_output(config, folder)
    ranks.gathered(None)  # wait until all have read what the first one now writes
    threads = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        return _run_stages(config, folder, device, say, report)
    finally:
        torch.set_num_threads(threads)


def _run_stages(
    config: ExtendConfig, folder: Path, device: torch.device, say: Say, report: Callable[[Metrics], None]
) -> dict[str, Any]:
    work = _open(config, folder, device)
    say(_critical(work.stretch))
    space_of(work.stretch, config.search)
    guides, asked = _guides(work), _questions(work)  # and the training data: all before hours are spent
    _check_training(work)
    there = _read_search(work, guides, say)
    trained = _train(work, there[0], say, report) if there and _is_trained(work) else None  # which checks it
    with ExitStack() as stack:
        if ranks.is_first():
            stack.enter_context(locked(folder))
            with drafted(folder / SETTINGS) as draft:
                draft.write_text(dump(config), encoding="utf-8")
        factors, outcome = there or _search(work, guides, say)
        outcome = _with_others(work, guides, outcome)
        _check_followers(work, factors)
        trained = trained or _train(work, factors, say, report)
        if not ranks.is_first():
            return {}
        grids = _score(work, asked, factors, trained, say)
        summary = _summary(work, factors, outcome, grids, trained)
        write_json(folder / SUMMARY, summary)
        _draw(work, factors, outcome, grids, summary)
        say(f"wrote {folder / REPORT}")
    return summary


# ---------------------------------------------------------------------------------------------------- settings


def _check_output(config: ExtendConfig, folder: Path) -> None:
    """Refuse a folder in which a stage left results that other settings made. Raises ConfigError."""
    if not (folder / SETTINGS).exists():
        return
    before = load_extension(folder / SETTINGS)
    stages = [*_STAGES]
    for place, stage in enumerate(stages):
        keys, _ = _STAGES[stage]
        changed = [told for key in keys for told in _changed(key, before, config)]
        made = [name for later in stages[place:] if any((folder / (name := _STAGES[later][1])).glob("*"))]
        if changed and made:
            raise ConfigError(
                f"{folder} holds results of other settings ({', '.join(changed)}); give another output, or remove "
                f"{', '.join(str(folder / name) for name in made)}"
            )


def _changed(key: str, before: ExtendConfig, now: ExtendConfig) -> list[str]:
    one, other = (settings.model_dump(mode="json")[key] for settings in (before, now))
    free = {"training": FREE, "search": {"iterations"}}.get(key, set())  # a search may go on for longer
    if one == other:
        return []
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [key]
    return [f"{key}.{name}" for name in sorted({*one, *other} - free) if one.get(name) != other.get(name)]


def _open(config: ExtendConfig, folder: Path, device: torch.device) -> Extension:
    start = RunConfig(
        init=config.init, output=config.output, train=["decoder"], steps=1, data=config.data, cache=config.cache,
        seed=(config.training or {}).get("seed", 0),  # fresh weights are those that training starts from
        mixture=[SourceConfig(source="books")],  # a run needs one; none is opened
    )  # fmt: skip
    model, tokenizer, _ = open_start(start)
    base = model.config.decoder.rope
    stretch = Stretch.of(base, model.config.decoder.head_dim, config.target)
    if config.search.short_temperature == "same":
        scale = temperature_scale(config.search.temperature, stretch.ratio, stretch.window)
        stretch = replace(stretch, short_scale=scale)
    return Extension(config, folder, device, _placed(model, config, device), tokenizer, base, stretch)


def _placed(model: Multimodal, config: ExtendConfig, device: torch.device) -> Multimodal:
    """Return a model in the dtype and on the device that it is asked in."""
    if config.dtype != "auto":
        model = model.to(_DTYPES[config.dtype])
    return model.to(device).eval()


def _critical(stretch: Stretch) -> str:
    return (
        f"window {stretch.window:,} to {stretch.target:,} tokens (s = {stretch.ratio:g}); of {stretch.pairs} rotated "
        f"pairs, {stretch.critical} and later complete no period in the window, {stretch.ten_turns} and later fewer "
        "than ten"
    )


# ------------------------------------------------------------------------------------------------------ search


def _documents(work: Extension, needles: NeedleConfig, part: Any, length: int) -> list[Document]:
    return make_documents(
        work.tokenizer, part_of_books(Path(work.config.data), part), needles.documents, length=length, part=part,
        style=needles.style, depths=needles.depths, needles=needles.needles, distractors=needles.distractors,
        seed=needles.seed,
    )  # fmt: skip


def _guides(work: Extension) -> list[Document]:
    documents = _documents(work, work.config.guide, "search", work.config.target)
    if work.config.guide.score == "text":
        return [plain_document(document.ids, seed=document.seed) for document in documents]
    return documents


def _questions(work: Extension) -> list[Document]:
    """Return what scores are measured on: documents of every length."""
    lengths, asked = work.config.score_lengths(work.stretch.window), work.config.scores.lengths
    try:
        return [one for length in lengths for one in _documents(work, work.config.scores, "evaluation", length)]
    except DataError as error:
        means = "" if asked else f", which stands for {lengths}"
        raise DataError(f"scores.lengths={asked}{means}: {error}") from None


def _read_search(work: Extension, documents: Sequence[Document], say: Say) -> tuple[Factors, dict[str, Any]] | None:
    """Return the factors of a finished search, and what it tells of itself; None where there is none."""
    target, told = work.folder / FACTORS, work.folder / "search" / "outcome.json"
    if not all(ranks.gathered(target.exists() and told.exists())):
        return None
    factors, source = read_factors(target)
    model = fingerprint(work.model)
    if (source.model, source.documents) != (model, _hashes(documents)):
        what = "model" if source.model != model else "documents"
        raise ConfigError(
            f"{target} was found with another {what}, under the same settings; give another output, or remove "
            f"{_listed(target, told.parent, *_followers(work))}"
        )
    before = source.settings.get("search", {}).get("iterations")
    if before != work.config.search.iterations:
        raise ConfigError(
            f"{target} is the result of {before} iterations, and search.iterations={work.config.search.iterations}; "
            f"remove {_listed(target, *_followers(work))}, and the search goes on from its log"
        )
    say(f"factors are there: {target}")
    found = read_json(told)
    if lacking := _TOLD - set(found):
        raise ConfigError(
            f"{told} was altered: it has no {', '.join(sorted(lacking))}; remove it, and the search goes on from its "
            "log"
        )
    if found["best"] != _as_json(asdict(factors)):
        raise ConfigError(
            f"{target} was altered: its factors are not those that the search found ({told}); remove it, and the "
            "search goes on from its log"
        )
    return factors, found


def _as_json(fields: Any) -> Any:
    """Return fields as they will be read back."""
    return json.loads(json.dumps(fields))


def _hashes(documents: Sequence[Document]) -> tuple[str, ...]:
    return tuple(document.sha256 for document in documents)


def _followers(work: Extension) -> list[Path]:
    """Return the folders of what was made with the factors."""
    return [folder for stage in ("training", "scores") if any((folder := work.folder / _STAGES[stage][1]).glob("*"))]


def _listed(*paths: Path) -> str:
    return " and ".join(filter(None, (", ".join(map(str, paths[:-1])), str(paths[-1]))))


def _check_followers(work: Extension, factors: Factors) -> None:
    """Refuse a training of other factors, which were found anew since; scores go with it. Raises ConfigError."""
    run, before = _training(work, factors), work.folder / _STAGES["training"][1] / "run.yaml"
    if run is not None and before.exists() and load_run(before).rope != run.rope:
        raise ConfigError(
            f"{before.parent} was trained with other factors than {work.folder / FACTORS} has now; remove "
            f"{_listed(*_followers(work))}, or give another output"
        )


def _search(work: Extension, documents: Sequence[Document], say: Say) -> tuple[Factors, dict[str, Any]]:
    """Return the factors found, and what the search tells of itself."""
    target, config, model = work.folder / FACTORS, work.config.search, fingerprint(work.model)
    judge = NeedleJudge(work.model, documents, rows=work.config.rows)
    say(f"searching: {config.population} candidates, {config.iterations} iterations, {len(documents)} documents")

    def show(figures: Mapping[str, Any]) -> None:
        say(_progress(figures))

    outcome = search(
        space_of(work.stretch, config), judge, config, folder=work.folder / "search",
        fingerprints={"model": model, "documents": list(_hashes(documents))}, report=show,
        surrogate=Surrogate(work.model, documents) if config.proposals > 1 else None,
    )  # fmt: skip
    found = _with_others(work, documents, _as_json(_outcome(outcome, documents)))
    if not ranks.is_first():
        return outcome.best, found
    settings = {"search": config.model_dump(mode="json"), "guide": work.config.guide.model_dump(mode="json")}
    provenance = Provenance(
        model=model, documents=_hashes(documents), seed=config.seed, settings=settings, loss=outcome.loss,
        evaluations=outcome.evaluations,
    )  # fmt: skip
    write_factors(target, outcome.best, provenance)
    say(f"wrote {target}: perplexity {found['perplexity']:.4g}, anchor {outcome.best.anchor}")
    return outcome.best, found


def _progress(figures: Mapping[str, Any]) -> str:
    line = f"iteration {figures['iteration']} of {figures['iterations']}, {figures['evaluations']:,} judged"
    if "perplexity" in figures:
        line += f", best perplexity {figures['perplexity']:.4g} with anchor {figures['anchor']}"
    return f"{line}, {figures['remaining_seconds']:,} s left" if figures["evaluations"] else line


def _with_others(work: Extension, documents: Sequence[Document], found: dict[str, Any]) -> dict[str, Any]:
    """Write what a search tells, with the mean nats on its documents of the methods that are compared now.

    Processes take turns with those that are not known.
    """
    (rank, world), others, known = ranks.place(), _others(work), found.get("others", {})
    if "others" in found and [*known] == [*others]:
        return found
    judge = NeedleJudge(work.model, documents, rows=work.config.rows)
    own = {
        name: float(judge.losses([others[name]], range(judge.documents)).double().mean())
        for name in [name for name in others if name not in known][rank::world]
    }
    known = {**known, **{name: loss for part in ranks.gathered(own) for name, loss in part.items()}}
    found = {**found, "others": {name: known[name] for name in others}}
    if ranks.is_first():
        write_json(work.folder / "search" / "outcome.json", found)
    return found


def _others(work: Extension) -> dict[str, Factors]:
    config = work.config
    found = other_methods(work.stretch, config.search.temperature)
    return {name: factors for name, factors in found.items() if name in config.scores.methods}


_TOLD = {"best", "perplexity", "loss", "anchor", "first_stretched", "evaluations", "passes", "share_of_passes",
         "others", "history", "documents"}  # fmt: skip


def _outcome(outcome: Outcome, documents: Sequence[Document]) -> dict[str, Any]:
    return {
        "best": asdict(outcome.best),
        "perplexity": exp(min(outcome.loss, 700.0)),
        "loss": outcome.loss,
        "anchor": outcome.best.anchor,
        "first_stretched": outcome.best.first_stretched,
        "evaluations": outcome.evaluations,
        "passes": outcome.passes,
        "share_of_passes": outcome.passes / (outcome.evaluations * len(documents)),
        "history": [dict(figures) for figures in outcome.history],
        "documents": [
            {"seed": one.seed, "tokens": len(one.ids), "scored": len(one.answers), "depths": one.depths,
             "sha256": one.sha256}
            for one in documents
        ],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- training


def _training(work: Extension, factors: Factors) -> RunConfig | None:
    """Return the training on the extended model, if there is one."""
    return work.config.run(rope=asdict(factors.rope(work.base)))


def _check_training(work: Extension) -> None:
    """Open the data of the training, with factors that any search may find. Raises ConfigError, DataError."""
    stand_in = other_methods(work.stretch)["linear"]
    run = _training(work, stand_in)
    if run is not None and not _is_trained(work):
        check_settings(run)
        make_mixture(run, open_context(run), ranks.place()).close()


def _is_trained(work: Extension) -> bool:
    return (work.folder / _STAGES["training"][1] / "model").exists()


def _train(work: Extension, factors: Factors, say: Say, report: Callable[[Metrics], None]) -> Path | None:
    """Train the extended model, if that is asked for, and return its folder."""
    run = _training(work, factors)
    return None if run is None else run_recipe(run, report, say)


# ------------------------------------------------------------------------------------------------------ scores


def _score(
    work: Extension, documents: Sequence[Document], factors: Factors, trained: Path | None, say: Say
) -> dict[str, Grid]:
    """Return the needles found by every method untrained, and by the trained model with and without its switch."""
    config, folder = work.config, work.folder / "scores"
    folder.mkdir(exist_ok=True)
    candidates = {**_others(work), **({"longrope2": factors} if "longrope2" in config.scores.methods else {})}
    hashes = [one.sha256 for one in documents]
    grids: dict[str, Grid] = {}
    for name, own in candidates.items():
        path, made_with = folder / f"{name}.json", {"factors": list(own.long), "documents": hashes}
        if not path.exists():
            say(f"measuring {TITLES[name]}, untrained: {len(documents)} documents")
            work.model.set_rope(own.rope(work.base))
            (grid,) = measure_grid(work.model, documents, rows=config.rows)
            work.model.set_rope(work.base)
            write_json(path, {**grid.as_json(), "made_with": made_with})
        grids[TITLES[name]] = _read_grid(path, made_with)
    if trained is None:
        return grids
    regimes: tuple[Regime, ...] = ("reference", "long")
    paths = [folder / f"trained-{regime}.json" for regime in regimes]
    made_with = {"factors": list(factors.long), "documents": hashes, "weights": weights_digest(trained)}
    # a model that was trained on since is measured anew
    if not all(path.exists() and read_json(path).get("made_with") == made_with for path in paths):
        say(f"measuring the trained model: {len(documents)} documents, twice")
        model = _placed(load_model(trained).model, config, work.device)
        for path, grid in zip(paths, measure_grid(model, documents, regimes=regimes, rows=config.rows), strict=True):
            write_json(path, {**grid.as_json(), "made_with": made_with})
    for path, regime in zip(paths, regimes, strict=True):
        grids[f"LongRoPE2, {TRAINED[regime]}"] = _read_grid(path, made_with)
    return grids


def _read_grid(path: Path, made_with: Mapping[str, Any]) -> Grid:
    """Return a grid that was written before. Raises ConfigError when it is of other factors or documents."""
    fields = read_json(path)
    if fields.get("made_with") != made_with:
        raise ConfigError(f"{path} was measured with other factors or documents; remove it, and it is measured anew")
    try:
        return Grid.from_json(fields)
    except (KeyError, TypeError):
        raise ConfigError(f"{path} was altered: it holds no whole grid; remove it, and it is measured anew") from None


# ------------------------------------------------------------------------------------------------------ report


def _summary(
    work: Extension, factors: Factors, outcome: Mapping[str, Any], grids: Mapping[str, Grid], trained: Path | None
) -> dict[str, Any]:
    stretch = work.stretch
    return {
        "model": work.config.init,
        "window": stretch.window,
        "target": stretch.target,
        "pairs": stretch.pairs,
        "theoretical_critical_pair": stretch.critical,
        "ten_period_pair": stretch.ten_turns,
        "anchor": factors.anchor,
        "first_stretched_pair": factors.first_stretched,
        "factors": str(work.folder / FACTORS),
        "trained": None if trained is None else str(trained),
        "search": {
            "measure": MEASURES[work.config.guide.score],
            **{key: value for key, value in outcome.items() if key not in ("best", "history", "documents")},
        },
        "scores": {title: grid.as_json()["by_length"] for title, grid in grids.items()},
    }


def _draw(
    work: Extension,
    factors: Factors,
    outcome: Mapping[str, Any],
    grids: Mapping[str, Grid],
    summary: Mapping[str, Any],
) -> None:
    """Write the pictures and the page that holds them."""
    curves = {TITLES[name]: own.long for name, own in _others(work).items()} | {TITLES["longrope2"]: factors.long}
    others = {TITLES[name]: loss for name, loss in outcome["others"].items()}
    progress = [(figures["evaluations"], figures["loss"]) for figures in outcome["history"]]
    pictures = {
        "factors": draw_factors(curves, work.stretch, factors.anchor, factors.first_stretched),
        "search": draw_search(progress, others, MEASURES[work.config.guide.score]),
        "by_length": draw_by_length(grids, work.stretch.window),
        "needles": draw_needles(grids, work.stretch.window),
    }
    for name, png in pictures.items():
        with drafted(work.folder / f"{name}.png") as draft:
            draft.write_bytes(png)
    with drafted(work.folder / REPORT) as draft:
        draft.write_text(as_page(summary, factors, outcome, pictures, dump(work.config)), encoding="utf-8")
