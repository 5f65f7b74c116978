"""Matrix products into given tensors; on a CPU, wide ones in blocks that its library multiplies faster.

MKL's float32 product of a few hundred rows loses up to a third of its rate when the output has thousands of columns
(or rows); in blocks of at most `MAX_WIDTH` it does not. oneDNN's 16-bit products gain nothing.
"""

import torch
from torch import Tensor

MAX_WIDTH = 1024


def blocks(length: int, longest: int) -> list[slice]:
    """Consecutive slices that cover `length`, of nearly equal size and none longer than `longest`."""
    count = -(-length // longest)
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


def multiply(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, beta: float = 0.0) -> None:
    """out = beta * out + a b; in a wider `out`, products are summed and added in its type where the device can.

    With beta 0 nothing of `out` counts, NaN included. Not differentiable.
    """
    if not a_NK.shape[1]:
        if beta == 0:
            out_NM.zero_()
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
