"""The optimizer runs with any rule: one with a single state tensor of another name, whole and in shards."""

from dataclasses import replace

import pytest
import torch
from model_testing import tiny_arguments
from torch import Tensor, nn

import pretrain_gpt
from megatron.core import collectives
from megatron.core.config import ParallelConfig
from megatron.core.distributed import gradient_buffers
from megatron.core.distributed.gradient_buffers import GradientBuffers, main_grad
from megatron.core.fusions.stored import StateType, narrow_
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_scheduler import StepRates
from megatron.core.optimizer.update_rule import Segment, Update
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel.parameter import spec_of

RATES = StepRates(learning_rate=0.5, vocabulary_learning_rate=0.25, weight_decay=0.125)


def _rounded(master: Tensor, like: Tensor) -> Tensor:
    weights = torch.empty_like(like)
    narrow_(weights, master)
    return weights


class Momentum:
    """SGD with momentum; it notes which elements of which parameters its segments hold."""

    def __init__(self) -> None:
        self.state_types = {"velocity": StateType()}
        self.number = 0
        self.seen: list[tuple[nn.Parameter, int, int]] = []

    def update(self, segment: Segment, numbers: Update) -> None:
        master, velocity = segment.master.data, segment.state["velocity"].data
        for parameter, start, end, offset in segment.pieces:
            weights = parameter.detach().view(-1)[start:end]
            assert _rounded(master[offset : offset + end - start], weights).equal(weights)
            self.seen.append((parameter, start, end))
        self.number = numbers.number
        velocity.mul_(0.5).add_(segment.grad, alpha=numbers.factor)
        master.mul_(1 - numbers.learning_rate * numbers.weight_decay)
        master.sub_(velocity, alpha=numbers.learning_rate)
        if segment.weights is not None:
            narrow_(segment.weights, master)


def _model(dtype: str) -> nn.Module:
    torch.manual_seed(0)
    model = pretrain_gpt.model_provider(tiny_arguments(dtype), ProcessGroups(), torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def _optimizer(model: nn.Module, rank: int = 0, size: int = 1) -> MixedPrecisionOptimizer:
    """Of one rank; the gradients are the weights. Other ranks exist in name only, so that nothing can be gathered."""
    group = Group(tuple(range(size)), rank)
    groups = replace(ProcessGroups(), dp=group, dp_cp=group, edp=group)
    buffers = GradientBuffers(model, groups, ParallelConfig(use_distributed_optimizer=size > 1))
    for parameter in model.parameters():
        main_grad(parameter).copy_(parameter.detach())
    return MixedPrecisionOptimizer(buffers, Momentum(), OptimizerConfig(clip_grad=0.0, loss_scale=4.0), groups)


def _expected(parameter: nn.Parameter, master: Tensor) -> tuple[Tensor, Tensor]:
    """Master and velocity after the first update."""
    spec, velocity = spec_of(parameter), master / 4
    rate = 0.25 if spec.is_vocabulary else 0.5
    return master * (1 - rate * (0.125 if spec.weight_decay else 0)) - rate * velocity, velocity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rule_updates_and_its_state_is_loaded_by_name(dtype: str) -> None:
    model = _model(dtype)
    before = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    optimizer = _optimizer(model)
    assert optimizer.step(RATES).updated
    saved = optimizer.state_dict()
    for name, parameter in model.named_parameters():
        master, velocity = _expected(parameter, before[name])
        assert saved["parameters"][name].keys() == {"master", "velocity"}
        torch.testing.assert_close(saved["parameters"][name]["master"], master, rtol=1e-6, atol=1e-6)
        assert saved["parameters"][name]["velocity"].equal(velocity)
        assert parameter.equal(_rounded(saved["parameters"][name]["master"], parameter))

    other = _model(dtype)
    resumed = _optimizer(other)
    resumed.check_state_dict(saved)
    resumed.load_state_dict(saved)
    assert resumed.scalars() == optimizer.scalars() and resumed.steps_taken == 1
    for each in (optimizer, resumed):
        for parameter in each.buffers.names:
            main_grad(parameter).fill_(0.5)
        assert each.step(RATES).updated
        assert isinstance(each.rule, Momentum) and each.rule.number == 2
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert ours.equal(theirs)
    saved["parameters"][name]["exp_avg"] = saved["parameters"][name].pop("velocity")
    with pytest.raises(ValueError, match=f"no velocity of {name}"):
        resumed.check_state_dict(saved)


def test_shards_together_are_every_element_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientBuffers, "gather_parameters", lambda self: None)
    whole = _model("bfloat16")
    reference = _optimizer(whole)
    assert reference.step(RATES).updated
    expected = reference.state_dict()["parameters"]
    updated = {name: torch.zeros(values["master"].numel()) for name, values in expected.items()}
    cut = 0
    for rank in range(3):
        optimizer = _optimizer(_model("bfloat16"), rank, 3)
        assert optimizer.step(RATES).updated
        for piece in optimizer.state_pieces():
            assert piece.tensors.keys() == {"master", "velocity"}
            for name, tensor in piece.tensors.items():
                assert tensor.equal(expected[piece.name][name].view(-1)[piece.start : piece.end])
            updated[piece.name][piece.start : piece.end] += 1
            cut += piece.end - piece.start < piece.parameter.numel()
        assert isinstance(optimizer.rule, Momentum)
        assert optimizer.rule.seen == [(piece.parameter, piece.start, piece.end) for piece in optimizer.state_pieces()]
    assert all((count == 1).all() for count in updated.values())
    assert cut, "no shard ends within a parameter"


def test_shards_are_brought_together_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end anywhere, also within a parameter; what each rank contributes to each of them is known beforehand."""
    monkeypatch.setattr(GradientBuffers, "gather_parameters", lambda self: None)
    monkeypatch.setattr(gradient_buffers, "PIECE", 3 * 1000)
    reference = _optimizer(_model("bfloat16"))
    reference.step(RATES)
    sent: list[list[Tensor]] = []
    monkeypatch.setattr(collectives, "all_gather_single", lambda out, x, group: sent[-1].append(x))
    for rank in range(3):
        optimizer = _optimizer(_model("bfloat16"), rank, 3)
        optimizer.step(RATES)
        sent.append([])
        assert optimizer.state_dict(keep=False) == {}
    pieces = iter(zip(*sent, strict=True))
    assert max(part.numel() for parts in sent for part in parts) == 1000
    monkeypatch.setattr(collectives, "all_gather_single", lambda out, x, group: out.copy_(torch.cat(next(pieces))))
    whole = optimizer.state_dict()["parameters"]
    assert next(pieces, None) is None
    for name, expected in reference.state_dict()["parameters"].items():
        assert whole[name].keys() == expected.keys()
        assert all(whole[name][key].equal(expected[key]) for key in expected)
