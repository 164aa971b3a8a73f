"""The nouns that rooms exchange."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modalora.contracts import IGNORED, Batch, Media, Route, image_tokens, subsampled, terms
from modalora.errors import RouteError


def batch() -> Batch:
    sound = Media("audio", {"mel": torch.zeros(8, 80)}, row=2, start=1, tokens=1, branch="speech")
    picture = Media("image", {"pixels": torch.zeros(1)}, row=0, start=0, tokens=2, branch="vision")
    return Batch(
        input_ids=torch.arange(12).view(3, 4),
        lengths=torch.tensor([4, 2, 3]),
        route=Route(("vision", None, "speech")),
        media=(picture, sound),
        labels=torch.arange(12).view(3, 4) + 100,
    )


def test_routes_group_rows_by_adapter() -> None:
    groups = Route(("a", None, "b", "a")).groups
    assert [name for name, _, _ in groups] == ["a", "b"]
    assert [rows.tolist() for _, _, rows in groups if rows is not None] == [[0, 3], [2]]
    assert Route((None, None)).groups == ()
    assert Route(("a", "a")).groups == (("a", 1.0, None),)


def test_rows_end_to_end_are_grouped_by_runs_of_tokens() -> None:
    route = Route(("b", "a", "a", None, "a+b@0.5"), (3, 2, 4, 5, 1))
    assert route.groups == (
        ("b", 1.0, slice(0, 3)),
        ("a", 1.0, slice(3, 9)),
        ("a", 1.0, slice(14, 15)),
        ("b", 0.5, slice(14, 15)),
    )
    assert Route(("a", None, "a"), (1, 2, 3)).groups == (("a", 1.0, slice(0, 1)), ("a", 1.0, slice(3, 6)))
    assert Route(("a", "a"), (1, 2)).groups == (("a", 1.0, None),)


def test_a_sum_of_adapters_is_names_with_weights() -> None:
    assert terms("vision+mine@0.7") == terms("vision + mine @ 0.7") == (("vision", 1.0), ("mine", 0.7))
    assert Route(("a+b@-0.5",)).groups == (("a", 1.0, None), ("b", -0.5, None))
    for wrong in ("", "+", "a+", "a@", "a@x", "a@nan", "a@inf", "a+a", "@2"):
        with pytest.raises(RouteError, match="is no sum of adapters; write names with"):
            terms(wrong)


def test_select_takes_rows_in_the_order_given_and_cuts_the_padding() -> None:
    some = batch().select([2, 1])
    assert some.input_ids.tolist() == [[8, 9, 10], [4, 5, 6]]
    assert some.labels is not None
    assert some.labels.tolist() == [[108, 109, 110], [104, 105, 106]]
    assert some.lengths.tolist() == [3, 2]
    assert some.route == Route(("speech", None))
    assert [(item.modality, item.row) for item in some.media] == [("audio", 0)]


def test_a_row_may_be_selected_twice() -> None:
    twice = batch().select([0, 0])
    assert [(item.modality, item.row) for item in twice.media] == [("image", 0), ("image", 1)]


def test_joined_puts_back_what_select_took_apart() -> None:
    whole = batch()
    joined = Batch.joined([whole.select([2]), whole.select([0, 1])])
    order = whole.select([2, 0, 1])
    for row, length in enumerate(order.lengths):
        assert torch.equal(joined.input_ids[row, :length], order.input_ids[row, :length])
        assert joined.labels is not None
        assert order.labels is not None
        assert torch.equal(joined.labels[row, :length], order.labels[row, :length])
        assert (joined.labels[row, length:] >= 100).logical_or(joined.labels[row, length:] == IGNORED).all()
    assert joined.input_ids.shape == (3, 4)
    assert (joined.route, joined.samples) == (order.route, ())
    assert sorted((item.modality, item.row) for item in joined.media) == [("audio", 0), ("image", 1)]
    unlabelled = replace(whole, labels=None)
    assert Batch.joined([unlabelled, unlabelled]).labels is None


def test_to_moves_every_tensor() -> None:
    moved = batch().to("meta")
    assert moved.labels is not None
    held = (moved.input_ids, moved.lengths, moved.labels, *(x for item in moved.media for x in item.features.values()))
    assert {tensor.device.type for tensor in held} == {"meta"}


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (8, 1), (9, 2), (98, 13), (2998, 375), (3998, 500)])
def test_sound_is_one_token_for_eight_frames_begun(frames: int, tokens: int) -> None:
    assert subsampled(frames) == tokens


# width x height, then the patches that hold picture; tokens are the published ones
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(32, 32, 545), (32, 2, 305), (48, 64, 1065), (64 - 4, 96, 273 + 30 * 49), (192, 192, 9585), (1152, 32, 10_065)],
)
def test_image_tokens_are_the_published_ones(rows: int, columns: int, tokens: int) -> None:
    assert image_tokens(rows, columns, 32) == tokens


def test_ignored_is_torchs() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED
