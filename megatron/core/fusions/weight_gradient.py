"""Handing weight gradients to the buffers that accumulate them, without a tensor in between.

The gradient buffers give a parameter the attribute `gradient_sink`, a function that takes `write` and calls
`write(main_grad, beta)` once, which must make main_grad = beta * main_grad + gradient (with beta 0 the old contents are
ignored, NaN too). Each call counts as one gradient that has arrived.
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


def deliver_tensor(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """The same for a gradient that is there already, in any type."""

    def write(out: Tensor, beta: float) -> None:
        out.copy_(gradient) if beta == 0 else out.mul_(beta).add_(gradient)

    return deliver(weight, write)
