"""RMSNorm as a module."""

from torch import Tensor, nn

from megatron.core.fusions.rms_norm import rms_norm
from megatron.core.tensor_parallel.parameter import ParameterSpec, Placement, new_parameter


class RMSNorm(nn.Module):
    """Normalises the last axis: [..., H] -> [..., H]."""

    def __init__(self, spec: ParameterSpec, epsilon: float, placement: Placement) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = new_parameter(spec, placement)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x / rms(x) * weight."""
        return rms_norm(x, self.weight, self.epsilon)
