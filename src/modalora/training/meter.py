"""Counts what operations on tensors without memory would hold, compute and move (training/plan.py).

Bytes are bytes, FLOPs count a multiply-add as two.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from modalora.nn.shown import factor

aten = torch.ops.aten
NOT_TOUCHED = {
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}  # of a table they read what they return


class Meter(TorchDispatchMode):
    """Counts what lives and what is computed while operations run on fake tensors."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake, self.now, self.peak, self.flops, self.moved = fake, 0, 0, 0, 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def hold(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is released; a storage counts once."""
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation; small real tensors, such as ids and masks, become fake where they meet fake ones."""
        kwargs = dict(kwargs or {})
        given = list(tensors_in((*args, *kwargs.values())))
        ctc = _ctc(*args) if operation is torch.ops.aten._ctc_loss.Tensor else None  # of lengths with values
        if len(given) > 1 and len({isinstance(tensor, FakeTensor) for tensor in given}) == 2:
            args, kwargs = tree_map(self._to_fake, (args, kwargs))
        out = operation(*args, **kwargs) if ctc is None else ctc
        formula = flop_registry.get(operation._overloadpacket)
        if formula is not None:
            self.flops += round(formula(*args, **kwargs, out_val=out) * factor())
        self.moved += round(_moved(operation, (*args, *kwargs.values()), (out,)) * factor())
        for tensor in tensors_in((out,)):
            self.hold(tensor)
        return out

    def _to_fake(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        return self.fake.from_tensor(leaf.detach())  # else its .grad is looked at, and torch warns of that


def _moved(operation: Any, given: Iterable[Any], made: Iterable[Any]) -> int:
    """Return the bytes that an operation reads and writes: none for a view, a question, or memory not yet filled."""
    if operation.is_view or operation._overloadpacket in NOT_TOUCHED:
        return 0
    written = sum(_touched(tensor) for tensor in tensors_in(made))
    if not written and not operation._schema.is_mutable:  # such as on which device a tensor is
        return 0
    if operation._overloadpacket in LOOKUPS:
        return 2 * written
    return written + sum(_touched(tensor) for tensor in tensors_in(given))


def _touched(tensor: Tensor) -> int:
    return min(size_of(tensor), tensor.untyped_storage().nbytes())  # what is expanded lies there once


def _ctc(scores: Tensor, targets: Tensor, lengths: Tensor, sizes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Return what CTC gives by shape, for which fake tensors have no rule: losses, and scores of its paths."""
    time, rows = scores.shape[:2]
    return scores.new_empty(rows), scores.new_empty(rows, time, 2 * int(sizes.max()) + 1)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Give the tensors of lists and tuples in each other."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()
