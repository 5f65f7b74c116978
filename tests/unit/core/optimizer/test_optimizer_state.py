"""The optimizer's state goes to the parameters' device when it is loaded."""

import pytest
import torch
from model_testing import tiny_arguments

import pretrain_gpt
from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.optimizer.optimizer import MixedPrecisionAdamW
from megatron.core.parallel_state import ProcessGroups


def _optimizer(device: str) -> MixedPrecisionAdamW:
    arguments = tiny_arguments("bfloat16")
    model = pretrain_gpt.model_provider(arguments, ProcessGroups(), torch.device(device))
    buffers = GradientBuffers(model.parameters(), ProcessGroups())
    return MixedPrecisionAdamW(model, buffers, arguments.optimizer, ProcessGroups())


def test_every_tensor_follows_its_parameter() -> None:
    saved = {
        name: {
            "master": value["master"],
            "exp_avg": torch.zeros_like(value["master"]),
            "exp_avg_sq": torch.zeros_like(value["master"]),
            "step": torch.tensor(3.0),
        }
        for name, value in _optimizer("cpu").state_dict().items()
    }
    elsewhere = _optimizer("meta")
    elsewhere.check_state_dict(saved)
    elsewhere.load_state_dict(saved)
    devices = {tensor.device.type for value in elsewhere.state_dict().values() for tensor in value.values()}
    assert devices == {"meta"}


def test_the_state_of_another_model_is_refused() -> None:
    optimizer = _optimizer("cpu")
    state = optimizer.state_dict()
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"exp_avg of {name} has shape"):
        optimizer.check_state_dict({**state, name: {**state[name], "exp_avg": torch.zeros(1)}})
    state.pop(name)
    with pytest.raises(ValueError, match="another model"):
        optimizer.check_state_dict(state)
