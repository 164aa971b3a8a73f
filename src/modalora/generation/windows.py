"""Which rotary table a row reads with, and when it changes.

LongRoPE has one table up to the original window and one beyond it, dynamic NTK one for every length beyond it. Cached
keys were turned by the table of their time, so a change costs reading the row again.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from modalora.errors import ConfigError
from modalora.nn.rope import DynamicNtk, LongRope, Rope, is_long, table_number

# When a row changes to the table of longer rows. crossing: when it outgrows the shorter one; it is then read again.
# planned: never; it has from the start the table of its prompt and max_tokens together.
Switch = Literal["crossing", "planned"]


def check_switch(rope: Rope, switch: str) -> None:
    """Refuse an unknown switch, and a plan for a table that never changes. Raises ConfigError."""
    if switch not in get_args(Switch):
        raise ConfigError(f"switch={switch!r} must be one of {', '.join(get_args(Switch))}")
    if switch == "planned" and (why := _one_table(rope)):
        raise ConfigError(f"switch='planned' has nothing to choose from: {why}; leave switch at 'crossing'")


def explain_table(rope: Rope, length: int, max_tokens: int, switch: str) -> dict[str, Any]:
    """Return `rope`, the table that a prompt is read with, `rope_why`, and `rope_crosses`.

    length: tokens of the prompt. rope_crosses: the length in tokens at which the answer changes the table and the row
    is read again; None where no answer of max_tokens does.
    """
    check_switch(rope, switch)
    end = length + max_tokens
    reach = end if switch == "planned" else length
    name: str = rope.kind
    if isinstance(rope, LongRope):
        name = "long" if is_long(rope, [reach])[0] else "short"
    if isinstance(rope, DynamicNtk):
        name = f"dynamic_ntk, factor {rope.at(reach).factor:.4g}"
    why = _one_table(rope)
    if not why and isinstance(rope, LongRope | DynamicNtk):
        what = f"{length} + {max_tokens} tokens of prompt and answer" if switch == "planned" else f"{length} tokens"
        original = rope.original_window
        why = f"{what} {'exceed' if reach > original else 'fit'} the original window of {original}"
    lengths = range(length + 1, end) if switch == "crossing" else ()  # the last token of an answer is not read
    crosses = (own for own in lengths if table_number(rope, own) != table_number(rope, own - 1))
    return {"rope": name, "rope_why": why, "rope_crosses": next(crosses, None)}


def _one_table(rope: Rope) -> str:
    """Return why the table of a row never changes; empty where it does."""
    if isinstance(rope, DynamicNtk):
        return ""
    if isinstance(rope, LongRope):
        return "" if rope.regime == "reference" else f"rope={rope.regime!r} gives every row this table"
    return "this model has one rotary table"
