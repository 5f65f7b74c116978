"""RMSNorm as a module."""

import torch
from torch import Tensor, nn

from megatron.core.fusions.rms_norm import rms_norm
from megatron.core.tensor_parallel.parameter import ParameterSpec, new_parameter


class RMSNorm(nn.Module):
    """Normalises the last axis: [..., H] -> [..., H]."""

    def __init__(
        self, hidden_size: int, *, epsilon: float, sequence_parallel: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        spec = ParameterSpec(global_shape=(hidden_size,), weight_decay=False, sequence_partial_grad=sequence_parallel)
        self.weight = new_parameter(spec, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x / rms(x) * weight."""
        return rms_norm(x, self.weight, self.epsilon)
