"""Which table a row reads with, told before it is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modalora.errors import ConfigError
from modalora.generation.windows import Switch, check_switch, explain_table
from modalora.nn.rope import DynamicNtk, Linear, LongRope, Plain, Rope

LONG = LongRope(short_factor=(1.0,), long_factor=(2.0,), window=512, original_window=64)
DYNAMIC = DynamicNtk(factor=2.0, window=512, original_window=64)


@pytest.mark.parametrize(
    ("rope", "length", "switch", "told"),
    [
        (LONG, 40, "crossing", ("short", "40 tokens fit the original window of 64", None)),
        (LONG, 60, "crossing", ("short", "60 tokens fit the original window of 64", 65)),
        (LONG, 64, "crossing", ("short", "64 tokens fit the original window of 64", 65)),
        (LONG, 65, "crossing", ("long", "65 tokens exceed the original window of 64", None)),
        (LONG, 48, "planned", ("short", "48 + 16 tokens of prompt and answer fit the original window of 64", None)),
        (LONG, 49, "planned", ("long", "49 + 16 tokens of prompt and answer exceed the original window of 64", None)),
        (DYNAMIC, 60, "crossing", ("dynamic_ntk, factor 1", "60 tokens fit the original window of 64", 65)),
        (DYNAMIC, 96, "crossing", ("dynamic_ntk, factor 2", "96 tokens exceed the original window of 64", 97)),
        (
            DYNAMIC, 112, "planned",
            ("dynamic_ntk, factor 3", "112 + 16 tokens of prompt and answer exceed the original window of 64", None),
        ),
        (replace(LONG, regime="long"), 3, "crossing", ("long", "rope='long' gives every row this table", None)),
        (replace(LONG, regime="short"), 99, "crossing", ("short", "rope='short' gives every row this table", None)),
        (Plain(), 3, "crossing", ("plain", "this model has one rotary table", None)),
        (Linear(factor=2.0), 3, "crossing", ("linear", "this model has one rotary table", None)),
    ],
)  # fmt: skip
def test_a_row_is_told_its_table_the_reason_and_where_it_changes(
    rope: Rope, length: int, switch: Switch, told: tuple[str, str, int | None]
) -> None:
    found = explain_table(rope, length, 16, switch)
    assert (found["rope"], found["rope_why"], found["rope_crosses"]) == told


def test_an_answer_whose_last_token_is_not_read_does_not_cross() -> None:
    assert explain_table(LONG, 60, 5, "crossing")["rope_crosses"] is None  # 64 tokens are read, the 65th is said
    assert explain_table(LONG, 60, 6, "crossing")["rope_crosses"] == 65


@pytest.mark.parametrize(
    ("rope", "switch", "told"),
    [
        (LONG, "never", "switch='never' must be one of crossing, planned"),
        (Plain(), "planned", "switch='planned' has nothing to choose from: this model has one rotary table; leave"),
        (replace(LONG, regime="long"), "planned", "nothing to choose from: rope='long' gives every row this table"),
    ],
)
def test_a_switch_that_says_nothing_is_refused(rope: Rope, switch: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_switch(rope, switch)
