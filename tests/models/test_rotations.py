"""Rows that bring their own rotary tables: as if the model's config held these factors, which it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from modalora.contracts import Batch, Rotations, Route, Step
from modalora.errors import ShapeError
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import tiny
from modalora.nn.rope import LongRope, Plain

CANDIDATES = [  # each with its own factors and scale
    LongRope(short_factor=(1.0,) * 6, long_factor=factors, rotated=0.75, window=2048, original_window=32, regime="long",
             mscale=(scale, scale))
    for factors, scale in (
        ((1.0, 1.5, 2.0, 3.0, 4.0, 8.0), 1.0), ((1.0, 2.0, 4.0, 8.0, 16.0, 64.0), 1.17), ((1.0,) * 6, 1.3),
    )
]  # fmt: skip


def with_rope(model: Multimodal, rope: LongRope | Plain) -> Multimodal:
    config = ModelConfig(decoder=replace(model.config.decoder, rope=rope), adapters=model.config.adapters)
    other = Multimodal(config).eval()
    other.load_state_dict({name: model.state_dict()[name] for name in other.state_dict()})
    return other


def rotations(ropes: list[LongRope], head_dim: int) -> Rotations:
    return Rotations(
        torch.stack([rope.frequencies(head_dim, long=True) for rope in ropes]),
        torch.tensor([rope.attention_factor(long=True) for rope in ropes]),
    )


def rows(lengths: list[int], adapters: tuple[str | None, ...]) -> Batch:
    ids = torch.randint(0, 320, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    return Batch(input_ids=ids, lengths=torch.tensor(lengths), route=Route(adapters))


def test_each_row_gives_the_bits_of_a_model_whose_config_holds_its_factors(
    make_model: Callable[..., Multimodal],
) -> None:
    model = make_model(ModelConfig(decoder=tiny().decoder, adapters=tiny().adapters))
    batch = rows([40, 33, 40], (None, "vision", "speech"))
    with torch.no_grad():
        together = model.hidden(batch, rotations=rotations(CANDIDATES, 16))
        for row, rope in enumerate(CANDIDATES):
            alone = with_rope(model, rope).hidden(batch.select([row]))
            assert torch.equal(together[row, : alone.shape[1]], alone[0])
        assert not torch.equal(together[0], model.hidden(batch)[0])


def test_rows_that_lie_end_to_end_have_tables_of_their_own_too(make_model: Callable[..., Multimodal]) -> None:
    model = make_model(ModelConfig(decoder=tiny().decoder))
    batch = rows([20, 20, 20], (None,) * 3)
    own = rotations(CANDIDATES, 16)
    spans = Step(
        lengths=batch.lengths, route=Route((None,) * 3, (20, 20, 20)), long=torch.zeros(3).bool(), rotations=own
    )
    with torch.no_grad():
        packed = model.decoder(model.decoder.embed(batch.input_ids.reshape(1, -1)), spans)
        # one product of 60 rows instead of three of 20: float32 sums in another order, worst seen 1e-6
        torch.testing.assert_close(packed.view(3, 20, -1), model.hidden(batch, rotations=own), atol=1e-5, rtol=1e-5)


def test_a_cache_is_continued_with_the_same_tables(make_model: Callable[..., Multimodal]) -> None:
    model = make_model(ModelConfig(decoder=tiny().decoder))
    batch, own = rows([24, 24, 24], (None,) * 3), rotations(CANDIDATES, 16)
    cache = model.new_cache(3)
    with torch.no_grad():
        whole = model.hidden(batch, rotations=own)
        model.hidden(replace(batch, input_ids=batch.input_ids[:, :16], lengths=torch.tensor([16] * 3)), cache, own)
        step = Step(
            lengths=torch.tensor([8] * 3), route=batch.route, long=torch.zeros(3).bool(), cache=cache, rotations=own
        )
        rest = model.decoder(model.decoder.embed(batch.input_ids[:, 16:]), step)
    # attention over a cache sums in another order; worst seen 1e-6
    torch.testing.assert_close(rest, whole[:, 16:], atol=1e-5, rtol=1e-5)


def test_config_weights_and_the_random_state_stay_as_they_were(make_model: Callable[..., Multimodal]) -> None:
    model = make_model(ModelConfig(decoder=tiny().decoder)).train()
    config, random = model.config, torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.hidden(rows([40, 33, 40], (None,) * 3), rotations=rotations(CANDIDATES, 16))
    assert model.config is config
    assert model.decoder.config.rope == tiny().decoder.rope
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("frequencies", "scale"), [((2, 6), (3,)), ((3, 9), (3,)), ((3, 0), (3,)), ((3, 6), (1,)), ((3, 6), (3, 1))]
)
def test_tables_that_do_not_fit_the_rows_are_refused(
    make_model: Callable[..., Multimodal], frequencies: tuple[int, ...], scale: tuple[int, ...]
) -> None:
    model = make_model(ModelConfig(decoder=tiny().decoder))
    with pytest.raises(ShapeError, match="rotations of 3 rows need frequencies"):
        model.hidden(rows([9, 9, 9], (None,) * 3), rotations=Rotations(torch.ones(frequencies), torch.ones(scale)))
