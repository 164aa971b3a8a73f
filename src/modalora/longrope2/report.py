"""The report of an extension: one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from modalora.longrope2.factors import Factors

_PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: .6em 0; }}
th, td {{ padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
small {{ color: #666; }}
img {{ display: block; max-width: 100%; }}
pre {{ background: #f5f5f5; padding: .7em; overflow-x: auto; }}
</style>
<h1>{title}</h1>
"""

_CAPTIONS = {
    "factors": "Divisor of every rotated pair, by method",
    "search": "The search: {measure} of the best candidate, and of the other methods on the same documents",
    "by_length": "Needles found by length, with 95 % intervals",
    "needles": "Needles found, in percent, by length and depth; the line is the trained window",
}


def as_page(
    summary: Mapping[str, Any],
    factors: Factors,
    outcome: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    settings: str,
) -> str:
    """Return the page. pictures: PNGs by the names of _CAPTIONS. settings: the recipe, as YAML."""
    title = f"{summary['model']}: {summary['window']:,} to {summary['target']:,} tokens"
    parts = [_PAGE.format(title=html.escape(title)), _table(("", ""), _facts(summary, outcome))]
    for name, caption in _CAPTIONS.items():
        data = base64.b64encode(pictures[name]).decode()
        told = caption.format(measure=summary["search"]["measure"])
        parts.append(f'<h2>{html.escape(told)}</h2>\n<img alt="{name}" src="data:image/png;base64,{data}">')
        if name == "by_length":
            parts.append(_scores(summary["scores"]))
    parts.append("<h2>Factors</h2>")
    rows = [(pair, f"{short:g}", f"{long:.6g}", _role(pair, summary))
            for pair, (short, long) in enumerate(zip(factors.short, factors.long, strict=True))]  # fmt: skip
    parts.append(_table(("pair", "short", "long", ""), rows))
    parts.append(f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>")
    return "\n".join(parts) + "\n"


def _facts(summary: Mapping[str, Any], outcome: Mapping[str, Any]) -> list[tuple[object, ...]]:
    documents = outcome["documents"]
    share = f"{outcome['share_of_passes']:.0%} of the documents that judging each wholly takes"
    stretched = summary["first_stretched_pair"]
    return [
        ("theoretical critical pair", summary["theoretical_critical_pair"]),
        ("first pair with fewer than ten periods", summary["ten_period_pair"]),
        ("real critical pair: anchor found", summary["anchor"]),
        ("real critical pair: first stretched by s", "none" if stretched is None else stretched),
        (f"{summary['search']['measure']} of the factors", f"{outcome['perplexity']:.4g}"),
        ("candidates judged", f"{outcome['evaluations']:,}"),
        ("documents read", f"{outcome['passes']:,}, {share}"),
        ("documents of the search", f"{len(documents)} of {documents[0]['tokens']:,} tokens"),
        ("tokens scored in each", f"{sum(one['scored'] for one in documents) / len(documents):g}"),
        ("extended model", summary["trained"] or "none: no training was asked for"),
    ]


def _scores(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lengths = [cell["length"] for cell in next(iter(scores.values()))]
    rows = [
        (title, *(f"{cell['accuracy']:.1%} <small>{cell['low']:.0%}-{cell['high']:.0%}</small>" for cell in cells))
        for title, cells in scores.items()
    ]
    heads = ("needles found", *(f"{length:,}" for length in lengths))
    return _table(heads, rows, raw=True)


def _role(pair: int, summary: Mapping[str, Any]) -> str:
    marks = {
        summary["ten_period_pair"]: "fewer than ten periods from here on",
        summary["theoretical_critical_pair"]: "theoretical critical pair",
        summary["anchor"]: "anchor",
    }
    return marks.get(pair, "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]], *, raw: bool = False) -> str:
    """Return a table; raw: cells behind the first are HTML already."""
    lines = ["<table>", f"<tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"]
    for first, *others in rows:
        told = [str(cell) if raw else html.escape(str(cell)) for cell in others]
        lines.append(f"<tr><td>{html.escape(str(first))}</td>{''.join(f'<td>{cell}</td>' for cell in told)}</tr>")
    return "\n".join([*lines, "</table>"])
