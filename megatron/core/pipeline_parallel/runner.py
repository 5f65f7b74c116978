"""Carrying out a schedule on one rank."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron.core.pipeline_parallel.p2p_communication import Message, StageLink
from megatron.core.pipeline_parallel.schedules import (
    AwaitReceived,
    AwaitSent,
    Backward,
    Forward,
    Instruction,
    Pass,
    Pipeline,
    Receive,
    Send,
    program,
)

# Takes the number of the microbatch, the number of the chunk and the hidden states of the previous stage (None on the
# first). Returns the stage's output, which on the last stage is what the gradients are of, and whatever the caller
# wants to keep of the microbatch.
RunChunk = Callable[[int, int, Tensor | None], tuple[Tensor, Any]]


def forward_backward(
    run_chunk: RunChunk,
    *,
    pipeline: Pipeline,
    rank: int,
    num_microbatches: int,
    link: StageLink,
    forward_only: bool = False,
    overlap: bool = True,
) -> list[Any]:
    """Runs all microbatches of a step through the chunks of this rank; returns what `run_chunk` kept, in its order.

    Gradients are those of the sum of the last stage's outputs. Collective over the pipeline's ranks. Raises ValueError
    if an interleaved pipeline cannot take this number of microbatches.
    """
    instructions = program(pipeline, rank, num_microbatches, forward_only=forward_only, overlap=overlap)
    with torch.set_grad_enabled(not forward_only):
        return _Runner(run_chunk, pipeline, rank, link).run(instructions)


class _Runner:
    """What is alive on a rank between two instructions.

    The output of a stage is let go once it is sent: its backward pass only needs the graph behind it, which is held by
    its gradient edge, and not its values, which are the next stage's business.
    """

    def __init__(self, run_chunk: RunChunk, pipeline: Pipeline, rank: int, link: StageLink) -> None:
        self.run_chunk, self.pipeline, self.rank, self.link = run_chunk, pipeline, rank, link
        self.coming: dict[Pass, Message] = {}
        self.inputs: dict[Pass, Tensor] = {}
        self.results: dict[Pass, Tensor] = {}
        self.leaving: dict[Pass, Message] = {}
        self.live: dict[tuple[int, int], tuple[Tensor | None, GradientEdge]] = {}
        self.kept: list[Any] = []

    def run(self, instructions: Iterable[Instruction]) -> list[Any]:
        """Follows the program to its end."""
        for instruction in instructions:
            match instruction:
                case Forward():
                    self._forward(instruction)
                case Backward():
                    self._backward(instruction)
                case Receive(work):
                    self.coming[work] = self.link.receive(work)
                case AwaitReceived(work):
                    self.inputs[work] = self.coming.pop(work).finish()
                case Send(work):
                    self.leaving[work] = self.link.send(work, self.results.pop(work))
                case AwaitSent(work):
                    self.leaving.pop(work).finish()
        return self.kept

    def _forward(self, work: Forward) -> None:
        hidden = self.inputs.pop(work, None)
        if hidden is not None and torch.is_grad_enabled():
            hidden.requires_grad_()
        output, kept = self.run_chunk(work.microbatch, work.chunk, hidden)
        self.kept.append(kept)
        if self.pipeline.sends(self.rank, work):
            self.results[work] = output.detach()
        if torch.is_grad_enabled():
            self.live[work.microbatch, work.chunk] = hidden, get_gradient_edge(output)

    def _backward(self, work: Backward) -> None:
        hidden, output = self.live.pop((work.microbatch, work.chunk))
        torch.autograd.backward(output, self.inputs.pop(work, None))
        if hidden is not None:
            assert hidden.grad is not None
            self.results[work] = hidden.grad
