"""Which rescaling of rotary positions extends a window best, and does it depend on what the base was trained on?

    python benchmarks/longrope2.py --data ../shared/data --output runs/window     # all; some hours of two cores
    python benchmarks/longrope2.py --premises rare --seeds 0 --steps 50 ...       # a part; finished parts are kept

A decoder of 5.4 million parameters reads 128 tokens (recipe window-1-base) and is taken to 1,024. Bases differ in one
thing: how far back lies what they had to look up, "rare" (far distances rarely), "uniform" or "long" (far ones alone);
LongRoPE2's premise (arXiv:2502.20082, section 3.1) is the first. No base is extended before it finds 99 % of the facts
at every depth of its own window that it was asked at. Every method then gets the same rows, number of tokens, optimiser
and temperature (sqrt(1 + ln s / ln L), of rows that its long table serves); seeds vary searches and training. Methods
are nothing but divisors of the 32 frequencies; all but LongRoPE2 use them for every row, LongRoPE2 from 129 tokens on
(mixed windows).
Scored on books that neither training nor searches saw: facts found by length and depth among as many others, and bits
per token. Intervals are 95 %, Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from math import log, sqrt
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from modalora.checkpoint.store import load_model
from modalora.checkpoint.write import save_model
from modalora.config import RunConfig, SearchConfig, load_run, parse
from modalora.contracts import Batch, Route
from modalora.disk import drafted
from modalora.evaluation.documents import make_documents, part_of_books
from modalora.evaluation.needle import Document, Grid, answer_losses, measure_grid, plain_document
from modalora.longrope2.factors import Provenance, Stretch, Temperature, read_factors, temperature_scale, write_factors
from modalora.longrope2.judges import NeedleJudge
from modalora.longrope2.pictures import draw_factors, draw_needles
from modalora.longrope2.search import search
from modalora.longrope2.space import space_of
from modalora.models.multimodal import Multimodal
from modalora.nn.rope import Linear, LongRope, Ntk, Plain, Regime, ScalingLawNtk, Yarn
from modalora.processing.tokenizer import TextTokenizer
from modalora.training.run import run_recipe

WINDOW, TARGET, THETA, HEAD = 128, 1024, 1000.0, 64
STRETCH = Stretch(theta=THETA, pairs=HEAD // 2, window=WINDOW, target=TARGET)
LENGTHS = (128, 256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DOCUMENTS = 30  # of each length, with a fact asked for at each depth: 150 questions
FACTS = 16  # tokens for each other fact of a document: about half of its text are facts
GATE = 0.99
ROUNDS = (700, 500, 500, 500)  # steps of a base that goes on from another, or from its own last round
FAR = {"long": 0.5}  # the last depth at which a base's rows ask; other bases are asked everywhere
RECIPE = Path(__file__).parents[1] / "src" / "modalora" / "recipes" / "window-1-base.yaml"
PLAIN = Plain(theta=THETA, window=WINDOW)
GIVEN = {  # methods that need no search
    "none": PLAIN,
    "pi": Linear(theta=THETA, window=TARGET, factor=STRETCH.ratio),
    "ntk": Ntk(theta=THETA, window=TARGET, factor=STRETCH.ratio),
    "ntk-law": ScalingLawNtk(theta=THETA, window=TARGET, original_window=WINDOW),
    "yarn": Yarn(theta=THETA, window=TARGET, original_window=WINDOW, factor=STRETCH.ratio),
    # no pair turns 32 times in 128 tokens, so YaRN as published keeps none as it is; 4 times leaves it some
    "yarn-4": Yarn(theta=THETA, window=TARGET, original_window=WINDOW, factor=STRETCH.ratio, beta_fast=4.0),
}
SIZE = {"population": 32, "iterations": 12}  # 224 candidates; the papers' 64 and 40 are for benchmarks/search.py
SEARCHED = {  # what is searched for, and whether the perplexity of whole documents guides it instead of needles
    "longrope2": (SearchConfig(**SIZE), False),
    "longrope": (SearchConfig(space="longrope", **SIZE), True),
    "longrope2-critical": (SearchConfig(anchor=STRETCH.critical, **SIZE), False),
    "longrope2-plain": (SearchConfig(**SIZE), True),
}
# method -> (factors, which rows the long table serves, temperature)
ARMS: dict[str, tuple[str, Regime, Temperature]] = {
    **{name: (name, "long", "su") for name in GIVEN},
    "longrope": ("longrope", "long", "su"),
    "longrope2-unmixed": ("longrope2", "long", "su"),
    "longrope2": ("longrope2", "reference", "su"),
    "longrope2-critical": ("longrope2-critical", "reference", "su"),
    "longrope2-plain": ("longrope2-plain", "reference", "su"),
    "longrope2-cold": ("longrope2", "reference", "none"),
}


# ------------------------------------------------------------------------------------------------------ the parts


def scores_folder(options: argparse.Namespace, premise: str) -> Path:
    return options.output / ("scores-one-search" if options.one_search else "scores") / premise


def base_folder(options: argparse.Namespace, premise: str) -> Path:
    return options.output / f"base-{premise}"


def train_base(options: argparse.Namespace, premise: str) -> None:
    """Train a base, and go on until it passes the gate or ROUNDS are over. From nothing, far distances alone teach no
    looking back (5 % of facts after 1,500 steps): that one goes on from the uniform base."""
    folder, before = base_folder(options, premise), None
    if premise == "long":
        before = base_folder(options, "uniform") / "model"
    for number, steps in enumerate(ROUNDS):
        output = folder / f"round-{number}"
        own = [f"output={output}", f"mixture.0.options.distances={premise}", f"data={options.data}", "threads=1"]
        if before is not None:
            own += [f"init={before}", f"steps={steps}", "optim.lr=0.002"]
        before = output / "model"
        if not before.exists():
            run_recipe(load_run(RECIPE, own))
        if options.ungated or weakest(premise, within(options, before))["accuracy"] >= GATE:
            break
    before.rename(folder / "model")


def within(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the scores of a base in its own window."""
    model, tokenizer = load(folder)
    return score(model, tokenizer, options, [WINDOW], ["reference"])


def weakest(premise: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the cell of fewest facts found, of the depths that a base's rows asked at."""
    cells = [cell for cell in found["grids"]["reference"]["cells"] if cell["depth"] <= FAR.get(premise, 1.0)]
    worst: dict[str, Any] = min(cells, key=lambda cell: cell["accuracy"])
    return worst


def check_base(options: argparse.Namespace, premise: str) -> None:
    """Measure a base within its own window. Raises SystemExit when it finds too little to be worth extending."""
    found = within(options, base_folder(options, premise) / "model")
    worst = weakest(premise, found)
    write(scores_folder(options, premise) / "base.json", found)
    if worst["accuracy"] < GATE and not options.ungated:
        raise SystemExit(
            f"base {premise!r} finds {worst['accuracy']:.1%} of the facts at length {worst['length']}, depth "
            f"{worst['depth']}; {GATE:.0%} is asked for at depths up to {FAR.get(premise, 1.0):g}: train it longer, or "
            "give --ungated"
        )


def find(options: argparse.Namespace, premise: str, name: str, seed: int) -> None:
    """Search for factors that suit a base."""
    model, tokenizer = load(base_folder(options, premise) / "model")
    config, plain = SEARCHED[name]
    config = config.model_copy(update={"seed": seed})
    documents = guides(tokenizer, options, plain, seed)
    folder = options.output / "searches" / premise / f"{name}-{seed}"
    started = time.process_time()
    found = search(space_of(STRETCH, config), NeedleJudge(model, documents), config, folder=folder)
    settings = {"search": config.model_dump(), "cpu_seconds": time.process_time() - started, "passes": found.passes}
    write_factors(
        folder / "factors.json",
        found.best,
        Provenance(
            documents=tuple(one.sha256 for one in documents), seed=seed, settings=settings, loss=found.loss,
            evaluations=found.evaluations,
        ),
    )  # fmt: skip


def extend(options: argparse.Namespace, premise: str, method: str, seed: int) -> None:
    """Give a base the factors of a method, score it, train it on two windows, and score it again."""
    rope = rope_of(options, premise, method, seed)
    target = scores_folder(options, premise) / f"{method}-{seed}.json"
    model, tokenizer = load(base_folder(options, premise) / "model")
    model.set_rope(rope)
    regimes: list[Regime] = ["reference", "long"] if rope.regime == "reference" else ["long"]
    before = score(model, tokenizer, options, [TARGET], regimes)
    run = training(options, premise, method, seed, rope)
    trained, _ = load(run_recipe(run))
    after = score(trained, tokenizer, options, LENGTHS, regimes)
    write(target, {"rope": asdict(rope), "before": before, "after": after})


def training(options: argparse.Namespace, premise: str, method: str, seed: int, rope: LongRope) -> RunConfig:
    """The same rows for every method: 56 % of the tokens in rows of the target window, 44 % in short ones, as in the
    published mix. What short rows hold is mostly text: nothing has to be learned there, and little may be lost."""
    mixture = [
        {"source": "retrieval", "name": "long-facts", "weight": 0.30, "window": TARGET,
         "options": {"distances": "uniform", "most": TARGET // FACTS}},
        {"source": "books", "name": "long-books", "weight": 0.26, "window": TARGET},
        {"source": "retrieval", "name": "short-facts", "weight": 0.06, "options": {"distances": premise}},
        {"source": "books", "name": "short-books", "weight": 0.38},
    ]  # fmt: skip
    fields = {
        "init": str(base_folder(options, premise) / "model"),
        "output": str(scores_folder(options, premise) / f"{method}-{seed}"),
        "train": ["decoder"], "rope": asdict(rope), "mixture": mixture, "weigh": "tokens", "window": WINDOW,
        "tokens": 4096, "steps": options.steps, "seed": seed, "threads": 1, "data": str(options.data),
        "log_every": 10, "save_every": options.steps,
        "optim": {"name": "muon", "lr": options.lr, "weight_decay": 0.0, "warmup_steps": 10, "final_lr_ratio": 0.0},
    }  # fmt: skip
    return parse(RunConfig, fields, "the training of an extension")


def rope_of(options: argparse.Namespace, premise: str, method: str, seed: int) -> LongRope:
    name, regime, temperature = ARMS[method]
    if name in GIVEN:
        divisors = PLAIN.frequencies(HEAD).double() / GIVEN[name].frequencies(HEAD).double()
        long = tuple(divisors.tolist())
    else:
        own = 0 if options.one_search else seed
        factors, _ = read_factors(options.output / "searches" / premise / f"{name}-{own}" / "factors.json")
        long = factors.long
    scale = temperature_scale(temperature, STRETCH.ratio, WINDOW)
    return LongRope(
        short_factor=(1.0,) * len(long), long_factor=long, theta=THETA, window=TARGET, original_window=WINDOW,
        mscale=(1.0, scale), regime=regime,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- scores


def load(folder: Path) -> tuple[Multimodal, TextTokenizer]:
    loaded = load_model(folder)
    return loaded.model.eval(), loaded.tokenizer


def score(
    model: Multimodal, tokenizer: TextTokenizer, options: argparse.Namespace, lengths: Sequence[int],
    regimes: Sequence[Regime],
) -> dict[str, Any]:  # fmt: skip
    """Return the grids of facts found, and bits per token of running text in windows of either size, by regime."""
    texts = part_of_books(options.data, "evaluation")
    documents = [
        one
        for length in lengths
        for one in make_documents(
            tokenizer, texts, DOCUMENTS, length=length, part="evaluation", style="words", depths=DEPTHS,
            needles=len(DEPTHS), distractors=length // FACTS, seed=length,
        )
    ]  # fmt: skip
    found: dict[str, Any] = {"grids": {}, "bits": {}}
    for regime in regimes:
        (grid,) = measure_grid(model, documents, regimes=[regime])
        found["grids"][regime] = grid.as_json()
    sizes = [size for size in (WINDOW, TARGET) if size <= max(lengths)]
    for size in sizes:
        found["bits"][str(size)] = float(answer_losses(model, running(tokenizer, options, size)).mean()) / log(2)
    return found


def running(tokenizer: TextTokenizer, options: argparse.Namespace, size: int, rows: int = 24) -> list[Document]:
    """Return the same running text cut into windows of a size; the first token of each window is not scored."""
    texts = part_of_books(options.data, "evaluation")
    rng = np.random.default_rng(7)
    found = []
    for number in range(rows):
        ids = tokenizer.encode(texts[number % len(texts)])
        start = int(rng.integers(0, len(ids) - TARGET))
        for at in range(start, start + TARGET, size):
            found.append(plain_document(ids[at : at + size], seed=number))
    return found


def guides(tokenizer: TextTokenizer, options: argparse.Namespace, plain: bool, seed: int) -> list[Document]:
    """Return what guides a search: facts asked for, or running text that counts as a whole."""
    texts = part_of_books(options.data, "search")
    if not plain:
        return make_documents(
            tokenizer, texts, 16, length=TARGET, part="search", style="words", depths=DEPTHS, needles=len(DEPTHS),
            distractors=40, seed=1000 + seed,
        )  # fmt: skip
    rng, found = np.random.default_rng(1000 + seed), []
    for number in range(16):
        ids = tokenizer.encode(texts[number % len(texts)])
        start = int(rng.integers(0, len(ids) - TARGET))
        found.append(plain_document(ids[start : start + TARGET], seed=number))
    return found


def write(path: Path, fields: Any) -> None:
    with drafted(path) as draft:
        draft.write_text(json.dumps(fields, indent=1), encoding="utf-8")


def exported(options: argparse.Namespace, premise: str) -> None:
    """Print how far transformers' logits are from ours, for the base with found factors written as Phi-3."""
    from transformers import Phi3ForCausalLM

    loaded = load_model(base_folder(options, premise) / "model")
    factors, _ = read_factors(options.output / "searches" / premise / "longrope2-0" / "factors.json")
    # transformers has one attention factor for both tables
    rope = LongRope(
        short_factor=factors.short, long_factor=factors.long, theta=THETA, window=TARGET, original_window=WINDOW
    )
    loaded.model.set_rope(rope)
    model = loaded.model.eval()
    with TemporaryDirectory() as folder:
        save_model(model, loaded.tokenizer, Path(folder) / "phi3", layout="phi3", chat=loaded.chat)
        theirs = Phi3ForCausalLM.from_pretrained(Path(folder) / "phi3", attn_implementation="eager").eval()
    for size in (WINDOW, WINDOW + 1, TARGET):
        ids = torch.tensor(running(loaded.tokenizer, options, TARGET)[0].ids)[None, :size]
        with torch.inference_mode():
            ours = model(Batch(ids, torch.tensor([size]), Route((None,))))
            apart = (theirs(ids).logits - ours).abs().max()
        print(f"transformers' Phi3 with the factors of {premise!r}, {size} tokens: logits {apart:.1e} apart at most")


# ----------------------------------------------------------------------------------------------------- tables

STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles, by number of seeds


def told(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Return a mean with its 95 % interval over seeds."""
    text = form.format(mean(values))
    if len(values) in STUDENT:
        text += " ± " + form.replace("+", "").format(STUDENT[len(values)] * stdev(values) / sqrt(len(values)))
    return text


def accuracy(found: dict[str, Any], regime: str, length: int) -> float:
    (cell,) = [one for one in found["grids"][regime]["by_length"] if one["length"] == length]
    return 100 * cell["accuracy"]


def lowest(found: dict[str, Any], regime: str, length: int) -> float:
    return 100 * min(one["accuracy"] for one in found["grids"][regime]["cells"] if one["length"] == length)


BEYOND = tuple(length for length in LENGTHS if length > WINDOW)
COLUMNS = (
    "method (seeds)", *(f"found at {length}, %" for length in BEYOND), f"worst depth of {TARGET}",
    f"{TARGET} before training", f"found at {WINDOW}, % of base", f"perplexity at {WINDOW}, % kept",
    f"bits, {TARGET} less {WINDOW}",
)  # fmt: skip


def table(options: argparse.Namespace, premise: str) -> None:
    """Print what became of each method on a base."""
    folder = scores_folder(options, premise)
    base = json.loads((folder / "base.json").read_text())
    found, bits = accuracy(base, "reference", WINDOW), base["bits"][str(WINDOW)]
    print(f"\n## Base {premise!r}: {found:.1f} % of facts at {WINDOW} tokens, {bits:.3f} bits per token of books\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for method, (_, regime, _) in ARMS.items():
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{method}-[0-9].json"))]
        for mode in ("long",) if regime == "long" else ("reference", "long"):
            if runs:
                name = method if mode == regime else f"{method}, always long"
                print(f"| {name} ({len(runs)}) | {' | '.join(cells(runs, mode, mode == regime, found, bits))} |")
    for name in SEARCHED:
        for file in sorted((options.output / "searches" / premise).glob(f"{name}-[0-9]/factors.json")):
            factors, made = read_factors(file)
            print(
                f"\nsearch {file.parent.name}: anchor {factors.anchor}, first pair of s or more "
                f"{factors.first_stretched} (theory {STRETCH.critical}, ten turns {STRETCH.ten_turns}), divisors "
                f"{factors.long[factors.anchor]:.2f} .. {factors.long[-1]:.2f} (s is {STRETCH.ratio:.0f}), loss "
                f"{made.loss:.4f}, {made.evaluations} candidates, {made.settings['cpu_seconds']:.0f} CPU s",
                end="",
            )
    print()


def cells(runs: Sequence[dict[str, Any]], mode: str, own: bool, found: float, bits: float) -> list[str]:
    """Return the columns of a method behind its name. own: whether the mode is the one that it is meant for, which
    running text was scored in. found, bits: of the base in its window."""
    after = [run["after"] for run in runs]
    shown = [told([accuracy(one, mode, length) for one in after]) for length in BEYOND]
    shown.append(told([lowest(one, mode, TARGET) for one in after]))
    shown.append(told([accuracy(run["before"], mode, TARGET) for run in runs]))
    shown.append(told([100 * accuracy(one, mode, WINDOW) / found for one in after]))
    if not own:
        return [*shown, "", ""]
    short, long = ([one["bits"][str(size)] for one in after] for size in (WINDOW, TARGET))
    shown.append(told([100 * 2 ** (bits - value) for value in short], "{:.2f}"))
    shown.append(told([one - other for one, other in zip(long, short, strict=True)], "{:+.3f}"))
    return shown


def draw(options: argparse.Namespace, premise: str) -> None:
    """Write the curves of the divisors, and facts found by length and depth after training, of the first seed."""
    folder, grids, curves = scores_folder(options, premise), {}, {}
    for method, (_, regime, _) in ARMS.items():
        if (file := folder / f"{method}-{options.seeds[0]}.json").exists():
            run = json.loads(file.read_text())
            grids[method] = Grid.from_json(run["after"]["grids"][regime])
            curves[method] = run["rope"]["long_factor"]
    if "longrope2" in curves:
        factors, _ = read_factors(
            options.output / "searches" / premise / f"longrope2-{options.seeds[0]}" / "factors.json"
        )
        first = factors.first_stretched
        (folder / "factors.png").write_bytes(draw_factors(curves, STRETCH, factors.anchor, first))
    (folder / "needles.png").write_bytes(draw_needles(grids, WINDOW))


# ------------------------------------------------------------------------------------------------------- order


def begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent() -> None:
    """End this process when the main one was killed and cannot tell it to."""
    if (parent := parent_process()) is not None:
        parent.join()
        signal.raise_signal(signal.SIGKILL)


def carry_out(options: argparse.Namespace, tasks: Sequence[tuple[Path, Callable[..., None], tuple[Any, ...]]]) -> None:
    """Do the tasks whose file is not there yet, several at a time; a task is told by its function and arguments."""
    waiting = [(work, arguments) for path, work, arguments in tasks if not path.exists()]
    if not waiting:
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=begin) as pool:
        begun = [(work, arguments, pool.submit(work, options, *arguments)) for work, arguments in waiting]
        for work, arguments, future in begun:
            future.result()
            print(f"{time.strftime('%H:%M:%S')} {work.__name__} {' '.join(map(str, arguments))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/window"))
    parser.add_argument("--premises", nargs="+", default=["rare", "uniform", "long"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument(
        "--one-search", action="store_true", help="every seed trains with the factors of seed 0's search"
    )
    parser.add_argument("--steps", type=int, default=100, help="of training after the extension, 4,096 tokens each")
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread")
    parser.add_argument("--ungated", action="store_true", help="extend a base that does not find all facts, too")
    options = parser.parse_args()
    output = options.output
    bases = {*options.premises, "uniform"} if "long" in options.premises else {*options.premises}
    for some in (bases - {"long"}, bases & {"long"}):
        carry_out(options, [(base_folder(options, one) / "model", train_base, (one,)) for one in sorted(some)])
    carry_out(options, [(scores_folder(options, one) / "base.json", check_base, (one,)) for one in options.premises])
    wanted = [name for name in SEARCHED if any(ARMS[method][0] == name for method in options.methods)]
    for seed in options.seeds:  # whole seeds first, so that what is there early can be compared
        own = 0 if options.one_search else seed
        searches = [(premise, name, own) for premise in options.premises for name in wanted]
        carry_out(
            options,
            [(output / "searches" / one[0] / f"{one[1]}-{own}" / "factors.json", find, one) for one in searches],
        )
        arms = [(premise, method, seed) for premise in options.premises for method in options.methods]
        carry_out(options, [(scores_folder(options, one[0]) / f"{one[1]}-{seed}.json", extend, one) for one in arms])
    for premise in options.premises:
        table(options, premise)
        draw(options, premise)
        if (output / "searches" / premise / "longrope2-0" / "factors.json").exists():
            exported(options, premise)


if __name__ == "__main__":
    main()
