"""`modalora plan`: what a training run, or reading with a model, needs, before anything is allocated."""

from __future__ import annotations

import sys
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalora.cli import options
from modalora.cli.options import given
from modalora.cli.words import lasting, sized, to_json

if TYPE_CHECKING:
    from modalora.config import RunConfig
    from modalora.training.plan import Plan


def plan(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(help="A recipe (YAML file or bundled name), a model (folder or size), or evoformer.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of the recipe to change.")] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(help="Shape of a row, e.g. text=200,image=1344x896,audio=10; several are taken in turn."),
    ] = None,
    machine: Annotated[
        str, typer.Option(help="this, or a GPU by name: a100, a100-40gb, h100, h200, l40s, rtx4090.")
    ] = "this",
    count: Annotated[int, typer.Option(min=1, help="GPUs that share the weights and the rows (FSDP).")] = 1,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak rate that a step reaches.")] = 0.4,
    hourly: Annotated[float, typer.Option(min=0, help="Price of one GPU for an hour.")] = 0,
    lengths: Annotated[
        str, typer.Option(help="A table of a training step by sequence length: 2048,4096, or doubled, 2k:1M.")
    ] = "",
    sequence: Annotated[int, typer.Option(min=0, help="GPUs that share one row of --lengths; 0: all.")] = 0,
    offload: Annotated[bool, typer.Option(help="Keep the inputs of layers on the CPU, in --lengths.")] = False,
    link: Annotated[float, typer.Option(min=0.001, help="GB/s that a GPU sends to others, in --lengths.")] = 25,
    alignment: Annotated[int, typer.Option(min=1, help="Sequences of an evoformer's alignment.")] = 512,
    as_json: options.Json = False,
) -> None:
    """Tell what trains, the memory by part, and the time, without allocating a weight.

    Example: modalora plan finetune-media --row text=200,image=300x200 --machine h100

    Example: modalora plan genome-25b --lengths 2k:1M --machine a100 --count 128
    """
    if lengths:
        if overrides or row or hourly:
            raise typer.BadParameter("--lengths is for planning a size; settings, --row and --hourly are for a recipe")
        if what != "evoformer" and given(context, "alignment"):
            raise typer.BadParameter(f"--alignment is the depth of an evoformer's alignment, and {what} has none")
        _by_length(what, lengths, (machine, count, share, link), (sequence, offload, alignment), as_json)
        return
    from modalora.cli.recipes import find_recipe
    from modalora.config import is_extension
    from modalora.errors import InputError
    from modalora.models.sizes import SIZES

    if alone := given(context, "sequence", "offload", "link", "alignment"):
        raise InputError(
            f"{' and '.join(alone)} without --lengths would change nothing; a recipe says mesh.sequence=N and "
            "recompute=offload, and a size is planned over --lengths 2k:1M"
        )
    if what == "evoformer":
        raise typer.BadParameter("an evoformer is planned over lengths, such as --lengths 512,1024")
    if what in SIZES or Path(what).is_dir() or what.startswith("bundled/"):
        if overrides or row or count > 1 or hourly:
            raise InputError(f"{what} is a model: settings, --row, --count and --hourly are for planning a recipe")
        _reading(what, machine, as_json)
        return
    recipe = find_recipe(what, SIZES)
    if is_extension(recipe):
        if row or hourly:
            raise InputError(f"{what} extends a window: --row and --hourly are for planning a training")
        _extension(recipe, overrides or [], (machine, count, share), as_json)
        return
    _training(recipe, overrides or [], row or [], (machine, count, share, hourly), as_json)


def _extension(path: Path, overrides: list[str], where: tuple[str, int, float], as_json: bool) -> None:
    from modalora.config import load_extension
    from modalora.longrope2.plan import plan_extension

    machine, count, share = where
    machines = [("h100", 1), ("h100", 8)] if (machine, count) == ("this", 1) else [(machine, 1), (machine, count)]
    found = plan_extension(load_extension(path, overrides), list(dict.fromkeys(machines)), share)
    if as_json:
        print(to_json(asdict(found)))
        return
    print(f"window     {found.window:,} to {found.target:,} tokens; {found.parameters:,} parameters")
    print(f"pairs      {found.pairs} rotated; {found.critical} is the first without a period in the window, "
          f"{found.ten_turns} the first with fewer than ten")  # fmt: skip
    print(f"search     {found.evaluations:,} candidates x {found.documents} documents of {found.target:,} tokens, "
          f"{found.document_flops:.3g} FLOP each: {found.plain_search_flops:.3g} FLOP")  # fmt: skip
    print(f"           racing reads {found.racing_share:.0%} of them, an assumption: {found.search_flops:.3g} FLOP")
    if found.training_tokens:
        print(f"training   {found.training_tokens:,} tokens, {found.short_share:.0%} in short rows: "
              f"{found.training_flops:.3g} FLOP, what is computed again included")  # fmt: skip
    print(f"scores     {found.score_flops:.3g} FLOP")
    print(f"{'time':<11}{'search':>10}{'training':>12}{'scores':>10}")
    for own in found.hours:
        print(f"{own.count} x {own.machine:<7}{lasting(3600 * own.search):>10}{lasting(3600 * own.training):>12}"
              f"{lasting(3600 * own.scores):>10}")  # fmt: skip
    measured = " (this machine's rate is measured)" if "this" in (own.machine for own in found.hours) else ""
    print(f"at {found.utilisation:.0%} of the peak rate, an assumption{measured}")


def _by_length(
    what: str,
    lengths: str,
    where: tuple[str, int, float, float],
    options: tuple[int, bool, int],
    as_json: bool,
) -> None:
    from modalora.cli.lengths import Devices, decoder_table, evoformer_table
    from modalora.errors import InputError

    if where[0] == "this":
        raise InputError("--lengths plans for GPUs by name; give --machine a100, or another")
    sequence, offload, alignment = options
    if what != "evoformer":
        decoder_table(what, lengths, Devices(*where), sequence, offload, as_json)
    elif sequence or offload:
        raise InputError("--sequence and --offload are for a decoder; --count shares an evoformer's rows")
    else:
        evoformer_table(lengths, alignment, Devices(*where), as_json)


def _training(
    path: Path, overrides: list[str], shapes: list[str], where: tuple[str, int, float, float], as_json: bool
) -> None:
    from modalora.config import load_stages

    size, runs = load_stages(path, overrides)
    _check_paths(overrides)
    found: list[dict[str, Any]] = []
    for title, run in runs.items():
        if size is not None and not as_json:
            print(f"\n{title}")
        found.append(_stage(title, run, shapes, size, where, as_json))
    if as_json:
        print(to_json(found if size is not None else found[0]))


def _check_paths(overrides: list[str]) -> None:
    """Refuse a path that was typed and matches no file; other rows stand in for those of a recipe alone."""
    from modalora.config import yaml
    from modalora.data.files import find_files

    for override in overrides:
        key, _, value = override.partition("=")
        path = yaml.read(value, override) if key.endswith("options.path") else None
        if isinstance(path, str) or (isinstance(path, list) and all(isinstance(one, str) for one in path)):
            find_files(path)  # what is no path is told where the source is opened


def _stage(
    title: str, run: RunConfig, shapes: list[str], size: str | None, where: tuple[str, int, float, float], as_json: bool
) -> dict[str, Any]:
    """Plan a run, tell it unless JSON is asked for, and return what JSON tells."""
    from modalora.config import source_names
    from modalora.training.estimate import estimate
    from modalora.training.plan import plan_run

    if not as_json and sys.stderr.isatty():
        print("carrying out one step without memory ...", file=sys.stderr)
    found, source = plan_run(run, shapes, size)
    machine, count, share, hourly = where
    cost = estimate(found, run, machine, count, share, hourly)
    told = {"run": title, "plan": asdict(found), "estimate": asdict(cost), "rows_from": source}
    if run.scored:
        times = len({found.steps, *range(0, found.steps, run.eval_every or run.save_every)})
        rows = run.eval_rows * len(run.scored)
        seconds = rows / found.rows * found.forward * cost.step_seconds  # rows as long as those of training
        told["scores"] = {"rows": rows, "every": run.eval_every, "times": times, "seconds": seconds}
    if as_json:
        return told
    print(f"{'part':<26} {'numbers':>15} {'trains':>15} {'weights':>10} {'gradients':>10} {'optimizer':>10}")
    for part in found.parts:
        sizes = "".join(f" {sized(size):>10}" for size in (part.weights, part.gradients, part.optimizer))
        print(f"{part.name:<26} {part.numbers:>15,} {part.trained:>15,}{sizes}")
    print(f"{found.trained:,} of {found.numbers:,} numbers train ({found.trained / found.numbers:.1%})")
    if idle := [part.name for part in found.parts if part.trained and not part.gradients]:
        print(f"no row of this step trains {', '.join(idle)}: without gradients here; --row takes rows that do")
    media = f"{found.tokens:,} tokens, {found.media_tokens:,} of them media; {found.labels:,} labels"
    print(f"a step     {found.rows} row{'s' if found.rows > 1 else ''} ({source}), {media}")
    split = f"weights {sized(found.weights)}, gradients {sized(found.gradients)}, optimizer {sized(found.optimizer)}"
    among, shared = (f" of each of {count}", " (before they are shared)") if count > 1 else ("", "")
    print(f"memory     {sized(cost.memory)}{among}: {split}{shared}, the step itself {sized(found.step)}")
    if cost.process:
        print(f"           and {sized(cost.process)} for the process")
    print(f"work       {found.flops / 1e12:.3g} TFLOP a step and {sized(found.moved)} read and written; "
          f"{cost.rate / 1e12:.3g} TFLOP/s: {cost.assumption}")  # fmt: skip
    price = f", price {cost.price:,.2f}" if hourly else ""
    speed = f"{cost.step_seconds:.3g} s a step, {found.tokens / cost.step_seconds:,.0f} tokens/s"
    steps = f"{found.steps:,} step{'s' if found.steps > 1 else ''}"
    print(f"time       {speed}, {lasting(cost.run_seconds)} for {steps}{price}")
    if run.accumulate % (shares := max(1, count // run.mesh.copies)):
        print(
            f"           accumulate={run.accumulate} cannot be shared by {shares}: training asks for a multiple of it"
        )
    if run.scored:
        names = ", ".join(source_names(run.scored))
        print(f"scored     up to {run.eval_rows:,} rows of each of {names}, every {run.eval_every:,} steps, "
              f"{times} times; up to {lasting(seconds)} each, beside the time above")  # fmt: skip
    if found.steps < run.steps:
        print(f"           the data end after about so many, before steps={run.steps}; more epochs give more")
    if cost.fits is False:
        print(f"it does not fit: {machine} has {sized(cost.capacity)}; {_mend(found, run, cost.memory - found.step)}")
    return told


def _mend(found: Plan, run: RunConfig, held: int) -> str:
    """Return what would make a run fit, where the most goes. held: bytes that one machine keeps between steps."""
    if found.step > held:
        again = "" if run.recompute else "recompute=true, "
        fewer = f"rows below {run.rows}" if run.rows > 1 else "shorter rows"
        less = f"tokens below {run.tokens}" if run.tokens else fewer
        return (
            f"the step itself is the most: try {again}{less}, or mesh.sequence=N with --count N, whose rows are shared"
        )
    sizes = {"weights": found.weights, "gradients": found.gradients, "optimizer": found.optimizer}
    most = max(sizes, key=lambda name: sizes[name])
    ways = ["more of --count, which share them"]
    if most == "weights" and run.base_bits is None and not any(fnmatchcase("decoder", one) for one in run.train):
        ways.append("base_bits=8 or 4, which hold the frozen decoder in less")
    if most != "weights":
        if most == "optimizer" and run.optim.name == "adamw" and run.optim.state_bits == 32:
            ways.append("optim.state_bits=8")
        ways.append("adapters instead of whole parts in train")
    verb = "is" if most == "optimizer" else "are"
    return f"the {most} {verb} the most, {sized(sizes[most])} before they are shared: try {', or '.join(ways)}"


def _reading(model: str, machine: str, as_json: bool) -> None:
    from modalora.training.estimate import plan_reading

    found = plan_reading(model, machine)
    if as_json:
        print(to_json(asdict(found)))
        return
    for name, size in found.weights.items():
        print(f"{name:<26} {sized(size):>10}")
    print(f"{'all weights':<26} {sized(sum(found.weights.values())):>10}")
    print(f"cache: {found.cache_per_token:,} bytes a token")
    print(f"{'tokens':>9} {'cache':>10} {'in all':>10} {'read in':>10} {'then tokens/s, at most':>23}")
    for line in found.lines:
        print(f"{line.tokens:>9,} {sized(line.cache):>10} {sized(line.memory):>10} {lasting(line.read_seconds):>10} "
              f"{line.decode_rate:>23.3g}")  # fmt: skip
    print(found.assumption)
