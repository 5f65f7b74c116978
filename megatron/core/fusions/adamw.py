"""AdamW (arXiv:1711.05101) on flat pieces of the parameters, in one pass over memory."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron.core.fusions.forms import operation


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
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, step: AdamWStep, weights: Tensor | None
) -> None:
    """Updates a flat piece of masters and moments in place from its gradients, which may not be used again.

    All are [n]; master and moments are of one type, `grad` of any. `weights`, of a narrower type, get the rounded
    masters.
    """
    grad = grad.to(master.dtype)
    if step.factor != 1.0:
        grad.mul_(step.factor)
    done = torch.full((), float(step.number - 1), device=master.device)
    adamw(
        [master], [grad], [exp_avg], [exp_avg_sq], [], [done],
        fused=True, amsgrad=False, beta1=step.beta1, beta2=step.beta2, lr=step.learning_rate,
        weight_decay=step.weight_decay, eps=step.epsilon, maximize=False,
    )  # fmt: skip
    if weights is not None:
        weights.copy_(master)
