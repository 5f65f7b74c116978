"""Conjugate collectives: the backward pass of each is the transpose of its forward.

With `f` the identity whose backward is an all-reduce and `g` the all-reduce whose backward is the identity
(arXiv:1909.08053, section 3), and their sequence-parallel twins `g_bar` and its conjugate (arXiv:2205.05198, section
4.2.2). The split axis of all sequence mappings is the first. Every mapping is the identity in a group of one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron.core import collectives
from megatron.core.parallel_state import Group

Operation = Callable[[Tensor], Tensor]


def all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Sum (or `op`) of `x` over the group, as a new tensor; not differentiable."""
    if group.size == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    collectives.all_reduce(x, op=op, group=group.handle)
    return x


def all_gather_first(x: Tensor, group: Group) -> Tensor:
    """Concatenation along the first axis of all ranks' `x`: [n, ...] -> [n * size, ...]; not differentiable."""
    if group.size == 1:
        return x
    out = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    collectives.all_gather_single(out, x.contiguous(), group=group.handle)
    return out


def start_all_gather_first(x: Tensor, group: Group) -> tuple[Tensor, Any]:
    """`all_gather_first` in a group of several, without waiting: the result is there when the request is done."""
    out = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    return out, collectives.all_gather_single(out, x.contiguous(), group=group.handle, async_op=True)


def reduce_scatter_first(x: Tensor, group: Group) -> Tensor:
    """This rank's slice of the sum over ranks: [n * size, ...] -> [n, ...]; not differentiable."""
    if group.size == 1:
        return x
    assert x.shape[0] % group.size == 0, f"{x.shape[0]} rows cannot be scattered over {group.size} ranks"
    out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    collectives.reduce_scatter_single(out, x.contiguous(), group=group.handle)
    return out


def start_reduce_scatter_first(x: Tensor, group: Group) -> tuple[Tensor, Any]:
    """`reduce_scatter_first` in a group of several, without waiting: the result is there when the request is done."""
    out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    return out, collectives.reduce_scatter_single(out, x.contiguous(), group=group.handle, async_op=True)


def split_first(x: Tensor, group: Group) -> Tensor:
    """This rank's slice along the first axis: [n * size, ...] -> [n, ...]."""
    return x.chunk(group.size, dim=0)[group.rank]


class _Conjugate(Function):
    """A linear operation forward, its transpose backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Operation, transpose: Operation) -> Tensor:
        ctx.transpose = transpose
        return operation(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grads[0]), None, None


def conjugate(x: Tensor, group: Group, operation: Operation, transpose: Operation) -> Tensor:
    """`operation(x)`, whose gradient `transpose` takes back; the identity in a group of one."""
    return x if group.size == 1 else _Conjugate.apply(x, operation, transpose)


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """`f`: hands a replicated tensor to ranks that each use it differently; backward sums the gradients."""
    return conjugate(x, group, lambda x: x.view_as(x), lambda grad: all_reduce(grad, group))


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """`g`: sums the ranks' partial results into a replicated tensor; backward is the identity."""
    return conjugate(x, group, lambda x: all_reduce(x, group), lambda grad: grad)


def reduce_scatter_to_sequence_parallel(x: Tensor, group: Group) -> Tensor:
    """`g_bar`: sums the partial results and keeps this rank's slice of the sequence, [s, ...] -> [s/tp, ...]."""
    return conjugate(x, group, lambda x: reduce_scatter_first(x, group), lambda grad: all_gather_first(grad, group))


def gather_last(x: Tensor, group: Group) -> Tensor:
    """Joins slices of the last axis: [..., n] -> [..., n * size]; not differentiable in a group larger than one."""
    if group.size == 1:
        return x
    parts = all_gather_first(x.detach().unsqueeze(0), group)
    return torch.cat(tuple(parts), dim=-1)
