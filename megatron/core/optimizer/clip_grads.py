"""The global gradient norm, in which every parameter of the model counts once under every layout."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.distributed.gradient_buffers import main_grad
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import spec_of


def gradient_norm(parameters: Iterable[nn.Parameter], groups: ProcessGroups) -> float:
    """L2 norm of all `main_grad`s of the model replica; the same number on all of its ranks.

    Tensors that all tensor-parallel ranks hold whole are counted on the first one only.
    """
    dense: list[Tensor] = []
    expert: list[Tensor] = []
    for parameter in parameters:
        spec = spec_of(parameter)
        if spec.is_expert:
            expert.append(main_grad(parameter))
        elif spec.partition_dim is not None or groups.tp.is_first:
            dense.append(main_grad(parameter))
    squares = [_squared_norm(grads) for grads in (dense, expert)]
    device = (dense + expert)[0].device if dense + expert else torch.device("cpu")
    total = 0.0
    for square, group in zip(squares, (groups.model, groups.expert_model), strict=True):
        value = torch.tensor(square, dtype=torch.float64, device=device)
        if group.size > 1:
            dist.all_reduce(value, group=group.handle)
        total += value.item()
    return total**0.5


def _squared_norm(grads: list[Tensor]) -> float:
    return torch.nn.utils.get_total_norm(grads).double().square().item() if grads else 0.0
