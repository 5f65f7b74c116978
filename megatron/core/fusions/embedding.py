"""Rows of a table, with a gradient that touches only the rows that were looked up."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import weight_gradient
from megatron.core.fusions.forms import operation


@operation
def add_rows_(out_VH: Tensor, ids_N: Tensor, values_NH: Tensor) -> None:
    """Adds each row of `values` to the row `ids` (int64) of `out`, in an order that is always the same."""
    out_VH.index_add_(0, ids_N, values_NH)


class _Lookup(Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight_VH
        return F.embedding(ids, weight_VH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        ids_N = ctx.saved_tensors[0].reshape(-1)
        grad_NH = grads[0].reshape(-1, grads[0].shape[-1])

        def write(out_VH: Tensor, beta: float) -> None:
            if beta == 0:
                out_VH.zero_()
            elif beta != 1:
                out_VH.mul_(beta)
            add_rows_(out_VH, ids_N, grad_NH.to(out_VH.dtype))

        return None, weight_gradient.deliver(ctx.weight, write)


def lookup(ids: Tensor, weight_VH: Tensor) -> Tensor:
    """Rows `ids` (int64, any shape) of the table [V, H], in its type: [..., H]."""
    return _Lookup.apply(ids, weight_VH)
