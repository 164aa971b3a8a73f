"""The cache keeps each row's keys behind that row's own."""

from __future__ import annotations

import torch

from modalora.nn.cache import KVCache


def numbered(batch: int, time: int, start: float) -> torch.Tensor:
    return (start + torch.arange(batch * time, dtype=torch.float32)).view(batch, time, 1, 1).expand(-1, -1, 2, 4)


def test_rows_of_unequal_length_go_on_where_each_ended() -> None:
    cache = KVCache(layers=1, batch=2)
    first = numbered(2, 3, 0)  # rows 0 1 2 and 3 4 5
    keys, values = cache.write(0, first, -first)
    assert torch.equal(keys, first)
    cache.advance(torch.tensor([3, 1]))
    assert cache.lengths.tolist() == [3, 1]
    keys, values = cache.write(0, numbered(2, 1, 10), -numbered(2, 1, 10))
    assert keys[0, :4, 0, 0].tolist() == [0, 1, 2, 10]
    assert keys[1, :2, 0, 0].tolist() == [3, 11]  # the padding of the first call is written over
    assert torch.equal(values, -keys)


def test_it_grows_and_keeps_what_it_held() -> None:
    cache = KVCache(layers=2, batch=1)
    held = []
    for number in range(200):  # room for 65, 130 and 260
        held.append(float(number))
        for layer in range(2):
            keys, _ = cache.write(layer, numbered(1, 1, number + 100 * layer), numbered(1, 1, 0))
            assert keys[0, :, 0, 0].tolist() == [value + 100 * layer for value in held]
        cache.advance(torch.tensor([1]))
    assert cache.lengths.tolist() == [200]


def test_select_keeps_rows_in_the_order_given() -> None:
    cache = KVCache(layers=1, batch=3)
    cache.write(0, numbered(3, 2, 0), numbered(3, 2, 0))
    cache.advance(torch.tensor([2, 1, 2]))
    cache.select([2, 1])
    assert cache.lengths.tolist() == [2, 1]
    keys, _ = cache.write(0, numbered(2, 1, 50), numbered(2, 1, 50))
    assert keys[0, :, 0, 0].tolist() == [4, 5, 50]
    assert keys[1, :2, 0, 0].tolist() == [2, 51]


def test_values_may_be_selected_before_every_layer_has_written() -> None:
    cache = KVCache(layers=2, batch=2)
    cache.write(0, numbered(2, 1, 0), numbered(2, 1, 0))
    cache.select([1])
    keys, _ = cache.write(1, numbered(1, 1, 5), numbered(1, 1, 5))
    assert keys.shape == (1, 1, 2, 4)


def test_rows_put_from_another_cache_go_on_as_they_would_there() -> None:
    cache, other = KVCache(layers=1, batch=3), KVCache(layers=1, batch=2)
    cache.write(0, numbered(3, 4, 0), numbered(3, 4, 0))
    cache.advance(torch.tensor([4, 2, 3]))
    other.write(0, numbered(2, 90, 100), -numbered(2, 90, 100))  # more than the first has room for
    other.advance(torch.tensor([1, 90]))
    cache.put([2, 0], other)
    assert cache.lengths.tolist() == [90, 2, 1]
    keys, values = cache.write(0, numbered(3, 1, 500), numbered(3, 1, 500))
    assert keys[0, :, 0, 0].tolist() == [*range(190, 280), 500]
    assert keys[1, :3, 0, 0].tolist() == [4, 5, 501]
    assert keys[2, :2, 0, 0].tolist() == [100, 502]
    assert values[0, :90, 0, 0].tolist() == [-number for number in range(190, 280)]
