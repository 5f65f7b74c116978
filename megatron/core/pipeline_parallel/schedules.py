"""The order of forward and backward passes of a step's microbatches."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core.pipeline_parallel.p2p_communication import StageLink

# Takes the hidden states of the previous stage (None on the first) and returns the stage's output, which on the last
# stage is the microbatch's mean loss, and whatever the caller wants to keep of the microbatch.
ForwardStep = Callable[[Tensor | None], tuple[Tensor, Any]]


def forward_backward(
    forward_step: ForwardStep, *, num_microbatches: int, link: StageLink, forward_only: bool = False
) -> list[Any]:
    """Runs all microbatches of a step through this rank's stage; returns what `forward_step` kept of each.

    Gradients are those of the mean of the microbatches' losses. Collective over the pipeline's stages.
    """
    step = _StageStep(forward_step, num_microbatches, link)
    if forward_only:
        with torch.no_grad():
            for _ in range(num_microbatches):
                _, hidden = link.exchange(from_previous=True)
                link.exchange(to_next=step.forward(hidden))
        return step.kept
    _one_forward_one_backward(step, num_microbatches, link)
    return step.kept


def _one_forward_one_backward(step: "_StageStep", num_microbatches: int, link: StageLink) -> None:
    """1F1B (PipeDream-Flush, arXiv:2104.04473, section 2.2); with one stage, plain gradient accumulation.

    Stage i of p runs p - i - 1 microbatches ahead, so that it never keeps more than p - i of them alive.
    """
    warmup = min(link.pp.size - link.pp.rank - 1, num_microbatches)
    for _ in range(warmup):
        _, hidden = link.exchange(from_previous=True)
        link.exchange(to_next=step.forward(hidden))
    steady = num_microbatches - warmup
    if steady:
        _, hidden = link.exchange(from_previous=True)
    for index in range(steady):
        output = step.forward(hidden)
        grad, _ = link.exchange(to_next=output, from_next=True)
        _, hidden = link.exchange(to_previous=step.backward(grad), from_previous=index + 1 < steady)
    for _ in range(warmup):
        grad, _ = link.exchange(from_next=True)
        link.exchange(to_previous=step.backward(grad))


class _StageStep:
    """Forward and backward of one microbatch at a time, first in, first out."""

    def __init__(self, forward_step: ForwardStep, num_microbatches: int, link: StageLink) -> None:
        self.forward_step, self.num_microbatches, self.link = forward_step, num_microbatches, link
        self.alive: deque[tuple[Tensor | None, Tensor]] = deque()
        self.kept: list[Any] = []

    def forward(self, hidden: Tensor | None) -> Tensor:
        if hidden is not None and torch.is_grad_enabled():
            hidden.requires_grad_()
        output, kept = self.forward_step(hidden)
        self.kept.append(kept)
        if self.link.pp.is_last:
            output = output / self.num_microbatches
        if torch.is_grad_enabled():
            self.alive.append((hidden, output))
        return output

    def backward(self, grad: Tensor | None) -> Tensor | None:
        """Takes the gradient of the oldest microbatch's output; returns that of its input."""
        hidden, output = self.alive.popleft()
        output.backward(grad)
        return None if hidden is None else hidden.grad
