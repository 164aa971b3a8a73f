"""Attention of the Evoformer under the name and in the layout of DeepSpeed4Science (arXiv:2310.04610, 4.1).

In OpenFold, in place of `from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention`:

    from modalora.science.evoformer_attention import DS4Sci_EvoformerAttention

It takes any length, head_dim and strides, CPUs and GPUs, float64, float32, float16 and bfloat16; its gradients have the
same bits in every run. It needs no compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modalora.errors import ShapeError
from modalora.nn.attend import attend
from modalora.nn.mask import Mask


def DS4Sci_EvoformerAttention(  # noqa: N802  the name that OpenFold imports
    Q: Tensor,  # noqa: N803
    K: Tensor,  # noqa: N803
    V: Tensor,  # noqa: N803
    biases: Sequence[Tensor | None],
) -> Tensor:
    """Return softmax(Q K' / sqrt(head_dim) + bias1 + bias2) V, (..., rows, length, heads, head_dim) like Q, K and V.

    biases: none, one or two. The first, (..., rows, 1, 1, length), has an entry for each key of a row; the second,
    (..., 1, heads, length, length), is shared by the rows. Either may be None; the list is left as it is. A query whose
    every key has a bias of -inf gets zeros. Finite masks, such as OpenFold's -1e9, are biases like others.
    Raises ShapeError when the biases do not fit, or there is nothing to attend.
    """
    if len(biases) > 2:
        raise ShapeError(f"{len(biases)} biases were given; Evoformer attention takes two at most")
    first, second = (*biases, None, None)[:2]
    if min(x.ndim for x in (Q, K, V)) < 4 or 0 in (*Q.shape, K.shape[-3]):
        raise ShapeError(
            f"Q {tuple(Q.shape)}, K {tuple(K.shape)} and V {tuple(V.shape)} must be (..., rows, length, heads, "
            "head_dim), with at least one of each"
        )
    (*lead, rows, length, heads, _), keys = Q.shape, K.shape[-3]
    for name, bias, shape in (
        ("first", first, (*lead, rows, 1, 1, keys)),
        ("second", second, (*lead, 1, heads, length, keys)),
    ):
        if bias is not None and bias.shape != shape:
            raise ShapeError(f"the {name} bias {tuple(bias.shape)} must be {shape} for Q {tuple(Q.shape)}")
    q, k, v = (x.reshape(-1, *x.shape[-4:]) for x in (Q, K, V))
    key_bias = None if first is None else first.reshape(-1, rows, keys)
    pair_bias = None if second is None else second.reshape(-1, heads, length, keys)
    return attend(q, k, v, mask=Mask(), key_bias=key_bias, pair_bias=pair_bias).reshape(Q.shape)
