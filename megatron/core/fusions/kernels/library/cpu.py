"""Of torch, MKL and oneDNN, for CPUs."""

from itertools import pairwise

import torch
from torch import Tensor

from megatron.core.fusions.kernels.library.cuda import HAS_GROUPED_MM, grouped_product

__all__ = ["HAS_GROUPED_MM", "grouped_product"]

MAX_WIDTH = 1024
"""Columns (or rows) of an output up to which MKL's float32 product of a few hundred rows keeps its rate; with thousands
of them it loses up to a third."""
ALIGNED = 64
"""Blocks start at multiples of this: the tiles of a product are then whole, and rows of it whole cache lines."""


def blocks(length: int, longest: int) -> list[slice]:
    """Consecutive slices that cover `length`, of nearly equal size and none longer than `longest`."""
    step = ALIGNED if longest >= ALIGNED else 1
    units = -(-length // step)
    count = -(-units // (longest // step))
    bounds = [min(units * i // count * step, length) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def row_multiple(x: Tensor, weight: Tensor, backend: str) -> int:
    """oneDNN makes a kernel for each number of rows that it meets, which takes longer than the product.

    16 was no faster.
    """
    return 32


def vocabulary_blocks(weight_VH: Tensor, tokens: int) -> list[slice]:
    """2^20 logits, which the softmax then finds in the cache, but at least 128 columns, which are worth a product."""
    return blocks(weight_VH.shape[0], min(max(2**20 // max(1, tokens), 128), MAX_WIDTH))


def multiply_(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, beta: float) -> None:
    """In blocks of at most `MAX_WIDTH` rows or columns."""
    if out_NM.shape[0] > out_NM.shape[1]:
        for rows in blocks(out_NM.shape[0], MAX_WIDTH):
            torch.addmm(out_NM[rows], a_NK[rows], b_KM, beta=beta, out=out_NM[rows])
    else:
        for columns in blocks(out_NM.shape[1], MAX_WIDTH):
            torch.addmm(out_NM[:, columns], a_NK, b_KM[:, columns], beta=beta, out=out_NM[:, columns])


def attention_block(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention in torch's form for CPUs."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)


def attention_block_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward pass."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, logsumexp, 0.0, causal
    )
