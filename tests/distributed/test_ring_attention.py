"""Attention over a split sequence equals attention over the whole one, forward and backward."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from closeness import relative_error
from distributed_testing import run_distributed
from torch import Tensor

from megatron.core.context_parallel.ring_attention import ring_attention
from megatron.core.context_parallel.zigzag import positions
from megatron.core.parallel_state import Group

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LENGTH = 48


def whole(dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the result, for 6 query heads in 2 groups; large scores on purpose."""
    generator = torch.Generator().manual_seed(11)
    shapes = ((2, 6, LENGTH, 8), (2, 2, LENGTH, 8), (2, 2, LENGTH, 8), (2, 6, LENGTH, 8))
    return [3 * torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def ring(rank: int, world_size: int) -> list[list[Tensor]]:
    cp = Group(tuple(range(world_size)), rank, dist.group.WORLD)
    mine = positions(LENGTH // world_size, cp, torch.device("cpu"))
    results = []
    for dtype in DTYPES:
        *inputs, grad = (part[:, :, mine] for part in whole(dtype))
        leaves = [part.requires_grad_() for part in inputs]
        out = ring_attention(*leaves, cp)
        out.backward(grad)
        results.append([mine, out.detach(), *(leaf.grad for leaf in leaves)])
    return results


def one_call(dtype: torch.dtype, operands: list[Tensor]) -> list[Tensor]:
    """By the kernel that the blocks of the ring are made with as well."""
    *inputs, grad = (part.to(dtype) for part in operands)
    leaves = [part.requires_grad_() for part in inputs]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [relative_error(a, b) for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_call_on_the_whole_sequence(world_size: int) -> None:
    """In float64 exactly; otherwise the merge, in float32, adds little to the error that a single call has."""
    outcomes = run_distributed(ring, world_size)
    order = torch.cat([outcome[0][0] for outcome in outcomes]).argsort()
    for number, dtype in enumerate(DTYPES):
        joined = [
            torch.cat([outcome[number][index] for outcome in outcomes], dim=2)[:, :, order] for index in range(1, 5)
        ]
        assert {part.dtype for part in joined} == {dtype}
        exact = one_call(torch.float64, whole(dtype))
        ring_errors = errors(joined, exact)
        if dtype == torch.float64:
            assert max(ring_errors) < 1e-14
            continue
        for ours, theirs in zip(ring_errors, errors(one_call(dtype, whole(dtype)), exact), strict=True):
            assert ours < (3 if dtype == torch.float32 else 1.5) * theirs, dtype
