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
