"""Matrix products into given tensors; on a CPU, wide ones in blocks that its library multiplies faster.

MKL's float32 product of a few hundred rows loses up to a third of its rate when the output has thousands of columns
(or rows); in blocks of at most `MAX_WIDTH` it does not. oneDNN's 16-bit products gain nothing. Products of bfloat16 on
tile registers (AMX) are our own, which write wider sums as they are.
"""

from itertools import pairwise

import torch
from torch import Tensor

from megatron.core.fusions.native import kernels as native

MAX_WIDTH = 1024
ALIGNED = 64
"""Blocks start at multiples of this: the tiles of a product are then whole, and rows of it whole cache lines."""


def blocks(length: int, longest: int) -> list[slice]:
    """Consecutive slices that cover `length`, of nearly equal size and none longer than `longest`."""
    step = ALIGNED if longest >= ALIGNED else 1
    units = -(-length // step)
    count = -(-units // (longest // step))
    bounds = [min(units * i // count * step, length) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def product(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """a b, by whatever `multiply` uses. Not differentiable."""
    out_NM = a_NK.new_empty(a_NK.shape[0], b_KM.shape[1])
    multiply(a_NK, b_KM, out_NM)
    return out_NM


def runs_on_tiles(a: Tensor, b: Tensor) -> bool:
    """Whether products of these are our own, on the tile registers of a CPU."""
    return a.dtype == torch.bfloat16 and native.multiplies(a, b)


def multiply(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, beta: float = 0.0) -> None:
    """out = beta * out + a b; in a wider `out`, products are summed and added in its type where the device can.

    With beta 0 nothing of `out` counts, NaN included. Not differentiable.
    """
    if not a_NK.shape[1]:
        out_NM.mul_(beta) if beta else out_NM.zero_()
    elif a_NK.dtype == torch.bfloat16 and native.multiplies(a_NK, b_KM, out_NM):
        native.multiply([(a_NK, b_KM, out_NM)], beta)
    elif out_NM.dtype != a_NK.dtype:
        _multiply_into_wider(a_NK, b_KM, out_NM, beta)
    elif out_NM.is_cuda or out_NM.dtype != torch.float32:
        _multiply(a_NK, b_KM, out_NM, beta)
    elif out_NM.shape[0] > out_NM.shape[1]:
        for rows in blocks(out_NM.shape[0], MAX_WIDTH):
            _multiply(a_NK[rows], b_KM, out_NM[rows], beta)
    else:
        for columns in blocks(out_NM.shape[1], MAX_WIDTH):
            _multiply(a_NK, b_KM[:, columns], out_NM[:, columns], beta)


def _multiply(a: Tensor, b: Tensor, out: Tensor, beta: float) -> None:
    if beta:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.mm(a, b, out=out)


def _multiply_into_wider(a: Tensor, b: Tensor, out: Tensor, beta: float) -> None:
    if out.is_cuda and out.dtype == torch.float32:
        # cuBLAS adds half-precision products to float32
        torch.addmm(out, a, b, beta=beta, out_dtype=torch.float32, out=out)
        return
    narrow = torch.mm(a, b)
    if beta:
        torch.add(narrow, out, alpha=beta, out=out)
    else:
        out.copy_(narrow)
