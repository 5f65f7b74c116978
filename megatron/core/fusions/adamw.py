"""AdamW (arXiv:1711.05101) on flat pieces of the parameters, in one pass over memory."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron.core.fusions.forms import operation
from megatron.core.fusions.stored import Stored, narrow_


class AdamWStep(NamedTuple):
    """The numbers of one update."""

    number: int
    """Updates including this one."""
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    factor: float
    """What gradients are multiplied by first: clipping, and the loss scale's reciprocal."""


@operation
def adamw_(
    master: Stored, exp_avg: Stored, exp_avg_sq: Stored, grad: Tensor, step: AdamWStep, weights: Tensor | None
) -> None:
    """Updates a flat piece of masters and moments in place from its gradients, which may not be used again.

    All are [n]. It is computed in the masters' type, float32 or wider; `grad` is of any. `weights`, of a narrower type,
    get the rounded masters; None if the masters are the weights or hold them.
    """
    kept = (master, exp_avg, exp_avg_sq)
    values = [stored.read().to(master.dtype) for stored in kept]
    grad = grad.to(master.dtype)
    if step.factor != 1.0:
        grad.mul_(step.factor)
    done = torch.full((), float(step.number - 1), device=grad.device)
    adamw(
        values[:1], [grad], values[1:2], values[2:], [], [done],
        fused=True, amsgrad=False, beta1=step.beta1, beta2=step.beta2, lr=step.learning_rate,
        weight_decay=step.weight_decay, eps=step.epsilon, maximize=False,
    )  # fmt: skip
    for stored, updated in zip(kept, values, strict=True):
        if updated is not stored.data:
            stored.write(updated)
    if weights is not None:
        narrow_(weights, values[0])
