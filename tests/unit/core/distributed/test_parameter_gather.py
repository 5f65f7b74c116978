"""When the updated parameters of the next step are gathered: in one order, one bucket ahead of their use."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core import collectives
from megatron.core.config import ParallelConfig
from megatron.core.distributed.gradient_buffers import Bucket, GradientBuffers
from megatron.core.parallel_state import Group, ProcessGroups, Ranks
from megatron.core.tensor_parallel.parameter import ParameterSpec, Placement, new_parameter

LAYERS = 5
BUCKET = 128
"""Elements: 8 x 8 and what makes the shards of two ranks aligned."""


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        placement = Placement(dtype=torch.float64, device=torch.device("cpu"))
        self.weight = new_parameter(ParameterSpec(global_shape=(8, 8)), placement)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _Work:
    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name = events, name

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is begun and awaited; a bucket is known by the number of its layer."""
    found: list[str] = []
    monkeypatch.setattr(
        collectives, "all_gather_single", lambda weights, own, **_: _Work(found, _note(found, "gather", weights))
    )
    monkeypatch.setattr(
        collectives, "reduce_scatter_single", lambda own, grads, **_: _Work(found, _note(found, "reduce", grads))
    )
    return found


def _note(events: list[str], what: str, flat: Tensor) -> str:
    number = LAYERS - 1 - flat.storage_offset() // BUCKET
    events.append(f"{what} {number}")
    return f"{what} {number}"


def _model(events: list[str], **settings: Any) -> tuple[nn.Sequential, GradientBuffers]:
    """Layers in buckets of their own, on the first of two ranks that do not exist."""
    pair = Group((0, 1), 0)
    groups = ProcessGroups(dp=Ranks((0, 1), 0), dp_cp=pair, edp=pair)
    model = nn.Sequential(*(_Layer() for _ in range(LAYERS)))
    overlap = {"overlap_param_gather": True, "overlap_grad_reduce": True, "ddp_bucket_size": 64}
    config = ParallelConfig(**{"use_distributed_optimizer": True, **overlap, **settings})
    buffers = GradientBuffers(model, groups, config)
    assert [buffer.weights.storage_offset() for buffer in buffers.buckets] == [BUCKET * n for n in range(LAYERS)]
    for number, layer in enumerate(model):
        layer.register_forward_hook(lambda *_, number=number: events.append(f"use {number}"))
    return model, buffers


def _gathers(events: list[str]) -> list[str]:
    return [event for event in events if event.startswith("gather")]


IN_ORDER = [f"gather {number}" for number in range(LAYERS)]


def test_one_bucket_ahead(events: list[str]) -> None:
    model, buffers = _model(events)
    buffers.gather_parameters()
    assert events == ["gather 0"]
    model(torch.ones(2, 8, dtype=torch.float64))
    expected = ["gather 0"]
    for number in range(LAYERS):
        expected += [f"gather {number + 1}"] * (number + 1 < LAYERS) + [f"wait gather {number}", f"use {number}"]
    assert events == expected
    model(torch.ones(2, 8, dtype=torch.float64))
    assert _gathers(events) == IN_ORDER, "once for each update"


def test_nothing_is_gathered_before_the_first_update(events: list[str]) -> None:
    model, _ = _model(events)
    model(torch.ones(2, 8, dtype=torch.float64))
    assert not _gathers(events)


def test_whoever_reads_the_parameters_gets_all_of_them(events: list[str]) -> None:
    _, buffers = _model(events)
    buffers.gather_parameters()
    buffers.wait_for_parameters()
    assert _gathers(events) == IN_ORDER
    assert [event for event in events if event.startswith("wait")] == [
        f"wait gather {number}" for number in reversed(range(LAYERS))
    ]


def test_a_layer_that_is_not_used_does_not_change_the_order(events: list[str]) -> None:
    """A rank that skips a layer has gathered all buckets before it reduces one, as have those that use it."""
    model, buffers = _model(events)
    buffers.gather_parameters()
    buffers.start_step(1)
    x = torch.ones(2, 8, dtype=torch.float64)
    for layer in list(model)[:3]:
        x = layer(x)
    x.sum().backward()
    buffers.finalize()
    communicated = [event for event in events if event.startswith(("gather", "reduce"))]
    assert communicated == IN_ORDER + [f"reduce {number}" for number in reversed(range(LAYERS))]


def test_without_overlap_all_are_there_at_once(events: list[str]) -> None:
    _, buffers = _model(events, overlap_param_gather=False)
    buffers.gather_parameters()
    assert _gathers(events) == IN_ORDER and sum(event.startswith("wait") for event in events) == LAYERS


def test_a_bucket_of_one_rank_is_not_gathered(events: list[str]) -> None:
    model = nn.Sequential(_Layer(), _Layer())
    config = ParallelConfig(use_distributed_optimizer=True, overlap_param_gather=True, ddp_bucket_size=64)
    buffers = GradientBuffers(model, ProcessGroups(), config)
    buffers.gather_parameters()
    model(torch.ones(2, 8, dtype=torch.float64))
    assert not events and all(isinstance(bucket, Bucket) for bucket in buffers.buckets)
