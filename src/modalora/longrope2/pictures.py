"""Pictures of an extension: divisors of all methods, progress of the search, needles found, score by length.

Every function returns a PNG. Windows are tokens, losses nats.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import exp, log2

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from modalora.evaluation.needle import Grid
from modalora.longrope2.factors import Stretch

_OURS = "LongRoPE2"  # drawn thicker than what it is compared with


def draw_factors(curves: Mapping[str, Sequence[float]], stretch: Stretch, anchor: int, first: int | None) -> bytes:
    """Draw the divisors of each method over the rotated pairs, beside the critical ones.

    curves: by title. anchor, first: of the search's result, the two meanings of the real critical dimension.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for title, values in curves.items():
        axes.plot(range(len(values)), values, label=title, marker=".", linewidth=_width(title))
    marks = {
        f"ten periods in the window: {stretch.ten_turns}": (stretch.ten_turns, ":"),
        f"theoretical critical pair: {stretch.critical}": (stretch.critical, "--"),
        f"anchor found: {anchor}": (anchor, "-."),
    }
    if first is not None:
        marks[f"first pair stretched by s: {first}"] = (first, "-")
    for shade, (label, (pair, line)) in enumerate(marks.items()):
        axes.axvline(pair, color=str(0.25 + 0.12 * shade), linestyle=line, linewidth=1, label=label)
    axes.axhline(stretch.ratio, color="0.6", linewidth=0.8)
    axes.text(0, stretch.ratio, f" s = {stretch.ratio:g}", va="bottom", color="0.4")
    axes.set(xlabel="rotated pair, fastest first", ylabel="divisor of the frequency")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_title(f"{stretch.window:,} to {stretch.target:,} tokens")
    axes.legend(fontsize="small")
    return _png(figure)


def draw_search(progress: Sequence[tuple[int, float]], others: Mapping[str, float], measure: str) -> bytes:
    """Draw the best perplexity after so many evaluations.

    others: mean nats of each method on the same documents. measure: of what the perplexity is, in words.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step(
        [count for count, _ in progress], [exp(loss) for _, loss in progress], where="post", linewidth=_width(_OURS)
    )
    for place, (title, loss) in enumerate(others.items()):
        axes.axhline(exp(loss), color=f"C{place + 1}", linestyle="--", linewidth=1)
        axes.annotate(title, (1, exp(loss)), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize="small", color=f"C{place + 1}")  # fmt: skip
    axes.set(xlabel="candidates judged", ylabel=f"{measure} of the best")
    if max(every := [*others.values(), *(loss for _, loss in progress)]) - min(every) > 2:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    return _png(figure)


def draw_needles(grids: Mapping[str, Grid], window: int) -> bytes:
    """Draw the share of questions answered by depth and length, a panel per model. window: that it was trained on."""
    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    figure = Figure(figsize=(1 + 4.2 * columns, 0.8 + 3.4 * rows), layout="constrained")
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    for axes, (title, grid) in zip(panels, grids.items(), strict=False):
        lengths = sorted({cell.length for cell in grid.cells})
        depths = sorted({cell.depth for cell in grid.cells if cell.depth is not None})
        share = {(cell.length, cell.depth): cell.accuracy for cell in grid.cells}
        table = [[share.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, line in enumerate(table):
            for column, value in enumerate(line):
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize="x-small")
        within = sum(length <= window for length in lengths)
        if 0 < within < len(lengths):
            axes.axvline(within - 0.5, color="black", linewidth=1)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=title, xlabel="tokens", ylabel="depth of the needle")
    figure.colorbar(image, ax=figure.axes, label="share answered exactly", shrink=0.6)
    return _png(figure)


def draw_by_length(grids: Mapping[str, Grid], window: int) -> bytes:
    """Draw the share of questions answered by length, with its 95 % intervals. window: that was trained first."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for place, (title, grid) in enumerate(grids.items()):
        cells = grid.by_length
        at = [log2(cell.length) + 0.02 * (place - len(grids) / 2) for cell in cells]
        shares = [cell.accuracy for cell in cells]
        bars = [
            [max(0.0, share - cell.interval[0]) for share, cell in zip(shares, cells, strict=True)],
            [max(0.0, cell.interval[1] - share) for share, cell in zip(shares, cells, strict=True)],
        ]
        axes.errorbar(at, shares, yerr=bars, label=title, marker="o", markersize=3, capsize=2, linewidth=_width(title))
    lengths = sorted({cell.length for grid in grids.values() for cell in grid.cells})
    axes.set_xticks([log2(length) for length in lengths], [f"{length:,}" for length in lengths])
    _mark_window(axes, log2(window))
    axes.set(xlabel="tokens", ylabel="needles found", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _png(figure)


def _mark_window(axes: Axes, at: float) -> None:
    axes.axvline(at, color="black", linewidth=1)
    axes.annotate(" trained window", (at, 0.02), xycoords=("data", "axes fraction"), fontsize="small")


def _width(title: str) -> float:
    return 2.4 if title.startswith(_OURS) else 1.1


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()
