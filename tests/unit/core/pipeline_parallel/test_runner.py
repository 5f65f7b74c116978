"""A rank in the middle of a pipeline, whose neighbours are made up: what it computes, and what it keeps in memory."""

import weakref

import pytest
import torch
from torch import Tensor

from megatron.core.pipeline_parallel.runner import forward_backward
from megatron.core.pipeline_parallel.schedules import Forward, Pass, Pipeline, passes


class _Storages:
    """Tensors by the lifetime of their memory."""

    def __init__(self) -> None:
        self._references: list[weakref.ref] = []
        self.peak = 0

    def watch(self, tensor: Tensor) -> Tensor:
        self._references.append(weakref.ref(tensor.untyped_storage()))
        self.peak = max(self.peak, self.alive)
        return tensor

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self._references)


class _Message:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def finish(self) -> Tensor:
        return self.tensor


class _Link:
    """Neighbours that send the number of the microbatch and keep nothing."""

    def __init__(self) -> None:
        self.inputs, self.gradients = _Storages(), _Storages()
        self.sent: list[tuple[Pass, float]] = []

    def send(self, work: Pass, tensor: Tensor) -> _Message:
        self.sent.append((work, tensor[0].item()))
        return _Message(tensor)

    def receive(self, work: Pass) -> _Message:
        watched = self.inputs if isinstance(work, Forward) else self.gradients
        return _Message(watched.watch(torch.full((4,), float(work.microbatch + 1))))


@pytest.mark.parametrize(("pipeline", "rank"), [(Pipeline(4), 1), (Pipeline(4, 2), 2)], ids=["1F1B", "interleaved"])
@pytest.mark.parametrize("forward_only", [False, True])
def test_memory_is_given_up_as_soon_as_the_schedule_permits(pipeline: Pipeline, rank: int, forward_only: bool) -> None:
    link, outputs, microbatches = _Link(), _Storages(), 8
    weight = torch.full((), 3.0, requires_grad=True)

    def forward(microbatch: int, chunk: int, hidden: Tensor | None) -> tuple[Tensor, Pass]:
        assert hidden is not None
        output = outputs.watch(hidden * weight)  # keeps its input for the backward pass, not its output
        return output, Forward(microbatch, chunk)

    kept = forward_backward(
        forward,
        pipeline=pipeline,
        rank=rank,
        num_microbatches=microbatches,
        link=link,  # type: ignore[arg-type]
        forward_only=forward_only,
    )
    assert kept == [work for work in passes(pipeline, rank, microbatches) if isinstance(work, Forward)]
    # besides the inputs of live microbatches, one is on its way in an interleaved pipeline; besides an output two are
    # being sent, or there only one, since it is received at once
    interleaved = pipeline.chunks > 1
    if forward_only:
        assert link.inputs.peak == 1 and link.gradients.peak == 0
    else:
        assert link.inputs.peak == pipeline.peak_live(rank, microbatches) + interleaved
        assert link.gradients.peak == 1
    assert outputs.peak == (2 if interleaved else 3)
    assert link.inputs.alive == outputs.alive == link.gradients.alive == 0
    if forward_only:
        assert weight.grad is None
        return
    # each microbatch adds the sum over its four entries of input times gradient
    assert weight.grad is not None
    assert weight.grad.item() == pipeline.chunks * sum(4 * (m + 1) ** 2 for m in range(microbatches))
    backward = [(work, value) for work, value in link.sent if not isinstance(work, Forward)]
    assert [value for _, value in backward] == [3.0 * (work.microbatch + 1) for work, _ in backward]


def test_gradients_are_those_of_the_sum_of_the_losses() -> None:
    weight = torch.ones((), requires_grad=True)
    kept = forward_backward(
        lambda microbatch, chunk, hidden: (weight * (microbatch + 1), microbatch),
        pipeline=Pipeline(1),
        rank=0,
        num_microbatches=4,
        link=None,  # type: ignore[arg-type]
    )
    assert kept == [0, 1, 2, 3]
    assert weight.grad is not None and weight.grad.item() == 10
