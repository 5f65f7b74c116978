"""RMSNorm as a module."""

from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.fusions.rms_norm import rms_norm
from megatron.core.tensor_parallel.parameter import ParameterSpec, Placement, new_parameter


class RMSNorm(nn.Module):
    """Normalises the last axis: [..., H] -> [..., H]."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        shape, partial = (config.hidden_size,), placement.sequence_parallel
        spec = ParameterSpec(global_shape=shape, weight_decay=False, sequence_partial_grad=partial)
        self.weight = new_parameter(spec, placement)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x / rms(x) * weight."""
        return rms_norm(x, self.weight, self.epsilon)
