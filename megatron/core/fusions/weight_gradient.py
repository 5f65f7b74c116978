"""Handing weight gradients to the buffers that accumulate them, without a tensor in between.

Whoever accumulates gradients gives a parameter the attribute `gradient_sink`, a function that takes `write` and calls
`write(main_grad, beta)` once, which must make main_grad = beta * main_grad + gradient (with beta 0 whatever was there
does not count, NaN included). It counts as one gradient that has arrived.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Write = Callable[[Tensor, float], None]


def deliver(weight: Tensor, write: Write) -> Tensor | None:
    """What a backward pass returns for `weight`: nothing if it has a sink, else the gradient for autograd."""
    sink = getattr(weight, "gradient_sink", None)
    if sink is None:
        gradient = torch.empty_like(weight)
        write(gradient, 0.0)
        return gradient
    sink(write)
    return None


def product(grad_NO: Tensor, x_NI: Tensor, out_OI: Tensor, beta: float) -> None:
    """out = beta * out + grad^T x; in a wider `out`, products are summed and added in its type where the device can."""
    if not grad_NO.shape[0]:
        if beta == 0:
            out_OI.zero_()
    elif out_OI.dtype == grad_NO.dtype:
        torch.addmm(out_OI, grad_NO.t(), x_NI, beta=beta, out=out_OI)
    elif out_OI.is_cuda and out_OI.dtype == torch.float32:
        # cuBLAS adds half-precision products to float32
        torch.addmm(out_OI, grad_NO.t(), x_NI, beta=beta, out_dtype=torch.float32, out=out_OI)
    else:
        narrow = torch.mm(grad_NO.t(), x_NI)
        out_OI.copy_(narrow) if beta == 0 else out_OI.mul_(beta).add_(narrow)
