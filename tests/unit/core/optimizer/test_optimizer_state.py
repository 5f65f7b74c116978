"""The optimizer's state goes to the parameters' device when it is loaded, and piece by piece to where it belongs."""

import pytest
import torch
from model_testing import tiny_arguments

import pretrain_gpt
from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.parallel_state import ProcessGroups


def _optimizer(device: str) -> MixedPrecisionOptimizer:
    arguments = tiny_arguments("bfloat16")
    model = pretrain_gpt.model_provider(arguments, ProcessGroups(), torch.device(device))
    buffers = GradientBuffers(model, ProcessGroups())
    return MixedPrecisionOptimizer(buffers, AdamW(arguments.optimizer), arguments.optimizer, ProcessGroups())


def test_every_tensor_follows_its_parameter() -> None:
    saved = _optimizer("cpu").state_dict()
    elsewhere = _optimizer("meta")
    elsewhere.check_state_dict(saved)
    elsewhere.load_state_dict(saved)
    devices = {tensor.device.type for piece in elsewhere.state_pieces() for tensor in piece.tensors.values()}
    assert devices == {"meta"}


def test_pieces_are_the_state() -> None:
    optimizer = _optimizer("cpu")
    for number, piece in enumerate(optimizer.state_pieces()):
        assert (piece.start, piece.end) == (0, piece.parameter.numel())
        for key, tensor in piece.tensors.items():
            tensor.fill_(number + optimizer.state_names.index(key) / 4)
    scalars = optimizer.scalars()
    optimizer.finish_loading(scalars | {"steps_taken": 7})
    assert optimizer.scalars() == scalars | {"steps_taken": 7}
    whole = optimizer.state_dict()["parameters"]
    for number, piece in enumerate(optimizer.state_pieces()):
        assert torch.equal(piece.parameter, torch.full_like(piece.parameter, number))
        for key in optimizer.state_names:
            expected = torch.full(piece.parameter.shape, number + optimizer.state_names.index(key) / 4)
            assert torch.equal(whole[piece.name][key], expected)


def test_the_state_of_another_model_is_refused() -> None:
    optimizer = _optimizer("cpu")
    state = optimizer.state_dict()
    parameters = state["parameters"]
    name = next(iter(parameters))
    spoilt = {**parameters, name: {**parameters[name], "exp_avg": torch.zeros(1)}}
    with pytest.raises(ValueError, match=f"exp_avg of {name} has shape"):
        optimizer.check_state_dict({**state, "parameters": spoilt})
    parameters.pop(name)
    with pytest.raises(ValueError, match="another model"):
        optimizer.check_state_dict(state)
    with pytest.raises(ValueError, match="not saved by this version"):
        optimizer.check_state_dict(parameters)
