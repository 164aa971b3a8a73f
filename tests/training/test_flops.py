"""Operations counted from sizes, against torch's count of what really ran."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toys import fresh, mixed

from modalora.contracts import IGNORED
from modalora.nn import products
from modalora.training.flops import StepFlops
from modalora.training.optimizer import trained_parts


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize(
    "parts", [("decoder",), ("adapter.vision",), ("adapter.*", "image.*", "audio.*"), ("image.projector.*",)]
)
def test_operations_are_those_that_torch_counts(
    row: int, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "HEIGHT", 0)  # the plain mathematics: filling up and recomputing are no progress
    model = fresh()
    trained = trained_parts(model, parts)
    batch = mixed(0).select([row])
    assert batch.labels is not None
    rows, columns = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    with FlopCounterMode(display=False) as counter:
        logits = model.decoder.head(model.hidden(batch)[rows, columns])
        if logits.requires_grad:
            logits.sum().backward()
    counted = counter.get_total_flops()
    # torch counts whole squares of attention and depthwise convolutions, we the causal half and none: worst seen 8 %
    assert StepFlops(model, trained, decodes=True).of([batch]) == pytest.approx(counted, rel=0.12)


def test_rows_without_a_trained_part_have_no_backward() -> None:
    model = fresh()
    batch = mixed(0).select([0])  # plain text
    alone = StepFlops(model, {"adapter.vision"}, decodes=True).of([batch])
    trained = StepFlops(model, {"decoder"}, decodes=True).of([batch])
    assert 2.9 * alone < trained <= 3 * alone
    assert torch.tensor(alone).isfinite()
