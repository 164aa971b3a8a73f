"""A second device, for machines that have none: memory of the CPU whose tensors refuse to meet the CPU's.

What is computed on it has the CPU's numbers. Like CUDA it takes numbers without axes and indices from the CPU, and
nothing else; to bring a tensor over is a copy; and to ask for its numbers (`tolist`, `int`, `bool`) is counted in
`questions`, since a GPU answers only once all its work is done.

Importing this changes torch for the whole process: `inference_mode` (PyTorch's wrappers of tensors keep no views there)
and `tensor`, which makes tensors on a device without asking Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten
questions: list[str] = []

COPIES = {aten._to_copy.default, aten.copy_.default}
# these take whole numbers of the CPU: indices, and the lengths of CTC
INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._ctc_loss.Tensor, aten._ctc_loss_backward.Tensor,
}  # fmt: skip
# what autocast computes in half precision, as it does on CUDA
HALVED = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "conv1d", "conv2d", "scaled_dot_product_attention")


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)


class There(Tensor):
    """A tensor elsewhere, around one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        found: There = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        found.inner = inner
        return found

    def __repr__(self) -> str:
        return f"There({self.inner!r})"

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(_lists_to_tensors(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_lists_to_tensors(key), value)

    def tolist(self) -> Any:
        questions.append("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {DEVICE} to numpy; use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _lists_to_tensors(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(_lists_to_tensors(one) for one in key)
    return torch.tensor(key) if isinstance(key, list) else key


def _run(operation: Any, args: Any, kwargs: Any) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_there = any(isinstance(tensor, There) for tensor in given)
    strangers = [tensor for tensor in given if is_there and tensor.dim() and not isinstance(tensor, There)]
    if operation in INDEXED and isinstance(args[0], There):
        strangers = [tensor for tensor in strangers if tensor.is_floating_point()]
    if strangers and operation not in COPIES:
        places = [(tuple(tensor.shape), str(tensor.device)) for tensor in given]
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, found {places}")
    if operation is aten._local_scalar_dense.default and is_there:
        questions.append("number")
    asked = kwargs.get("device")
    args_here, kwargs_here = tree_map(lambda leaf: leaf.inner if isinstance(leaf, There) else leaf, (args, kwargs))
    if asked is not None:
        kwargs_here["device"] = torch.device("cpu")
    if "pin_memory" in kwargs_here:
        kwargs_here["pin_memory"] = False
    out = operation(*args_here, **kwargs_here)
    if operation is aten.copy_.default:
        return args[0]
    if not (is_there if asked is None else torch.device(asked).type == NAME):
        return out
    out = tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, out)
    return return_and_correct_aliasing(operation, args, kwargs, out)


def _halved(name: str) -> Callable[..., Any]:
    without_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        def cast(leaf: Any) -> Any:
            is_ours = isinstance(leaf, Tensor) and leaf.device.type == NAME and leaf.is_floating_point()
            return leaf.to(torch.get_autocast_dtype(NAME)) if is_ours and leaf.dtype != torch.float64 else leaf

        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            args, kwargs = tree_map(cast, (args, kwargs))
            return getattr(aten, name).default(*args, **kwargs)

    return run


def _made_there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, device=device, **settings)
        return make(data, **settings).to(DEVICE)

    return made


_everything = torch.library.Library("_", "IMPL")
_everything.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
_everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_some = torch.library.Library("aten", "IMPL")
for _name in HALVED:
    _some.impl(_name, _halved(_name), "AutocastPrivateUse1")
torch.tensor, torch.as_tensor = _made_there(torch.tensor), _made_there(torch.as_tensor)
torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]
