"""The router table of the paper."""

from __future__ import annotations

import pytest

from modalora.errors import RouteError
from modalora.models.router import ROUTES, route

BOTH = ("vision", "speech")


def test_the_table_is_the_papers() -> None:
    rules = {
        (): (None, {}),
        ("image",): ("vision", {"image": "vision"}),
        ("audio",): ("speech", {"audio": "speech"}),
        ("audio", "image"): ("vision", {"image": "vision", "audio": "vision"}),
    }
    assert len(ROUTES) == len(rules)
    for held, (adapter, branches) in rules.items():
        rule = route(held, adapters=BOTH)
        assert rule.adapter == adapter
        assert rule.branches == branches


def test_a_requested_adapter_replaces_the_adapter_and_keeps_the_projectors() -> None:
    rule = route({"audio"}, "vision", BOTH)
    assert (rule.adapter, rule.branches) == ("vision", {"audio": "speech"})
    rule = route({"image", "audio"}, "none", BOTH)
    assert (rule.adapter, rule.branches) == (None, {"image": "vision", "audio": "vision"})


def test_an_unknown_route_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RouteError, match=r"unknown route 'visoin'; use one of auto, none, speech, vision"):
        route({"image"}, "visoin", BOTH)


def test_an_adapter_that_the_model_lacks_is_named() -> None:
    with pytest.raises(RouteError, match=r"image needs the adapter 'vision'.*it has none"):
        route({"image"})


def test_media_without_a_rule_are_named() -> None:
    with pytest.raises(
        RouteError, match="no route for smell; there are routes for text, image, audio, audio \\+ image"
    ):
        route({"smell"}, adapters=BOTH)
