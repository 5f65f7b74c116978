"""The order of passes of 1F1B, seen through a link that only writes down what it is asked."""

import pytest
import torch

from megatron.core.parallel_state import Group
from megatron.core.pipeline_parallel.schedules import forward_backward


class _Recorder:
    """Stands for a stage's link: gives zeros, keeps the order of events and the number of live microbatches."""

    def __init__(self, stages: int, stage: int) -> None:
        self.pp = Group(tuple(range(stages)), stage)
        self.events: list[str] = []

    def exchange(self, *, to_next=None, to_previous=None, from_next=False, from_previous=False):
        if to_previous is not None:
            self.events.append("B")
        return (
            torch.zeros(2) if from_next and not self.pp.is_last else None,
            torch.zeros(2) if from_previous and not self.pp.is_first else None,
        )


def _run(stages: int, stage: int, microbatches: int) -> tuple[list[str], int, list[int]]:
    link = _Recorder(stages, stage)
    weight = torch.ones(2, requires_grad=True)
    alive, peak = [0], [0]
    order: list[str] = []

    def forward(hidden: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        order.append("F")
        alive[0] += 1
        peak[0] = max(peak[0], alive[0])
        output = (weight if hidden is None else hidden + weight) * 1

        def passed(grad: torch.Tensor) -> None:
            order.append("B")
            alive[0] -= 1

        output.register_hook(passed)
        return (output.sum() if link.pp.is_last else output), len(order)

    kept = forward_backward(forward, num_microbatches=microbatches, link=link)  # type: ignore[arg-type]
    return order, peak[0], kept


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_one_forward_one_backward(stages: int, microbatches: int) -> None:
    for stage in range(stages):
        order, peak, kept = _run(stages, stage, microbatches)
        warmup = min(stages - stage - 1, microbatches)
        steady = microbatches - warmup
        assert "".join(order) == "F" * warmup + "FB" * steady + "B" * warmup
        assert peak == min(stages - stage, microbatches)
        assert len(kept) == microbatches
