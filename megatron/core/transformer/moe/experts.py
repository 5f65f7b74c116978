"""All experts of a rank, on stacked weights."""

import torch
from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.fusions.grouped_gemm import grouped_gemm
from megatron.core.fusions.swiglu import weighted_swiglu
from megatron.core.parallel_state import Group
from megatron.core.recompute import without_keeping
from megatron.core.tensor_parallel.parameter import ParameterSpec, new_parameter


class _StackedWeight(nn.Module):
    """One matrix for each local expert, stacked: [experts, out, in]."""

    def __init__(self, spec: ParameterSpec, experts: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = new_parameter(spec, dtype, device, stack=experts)


class Experts(nn.Module):
    """SwiGLU experts: rows sorted by expert [R, H] -> [R, H] (a part of the sum over `group`)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        output_std: float,
        ep_group: Group,
        group: Group,
        recompute_activation: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.recompute_activation = recompute_activation
        experts = config.num_experts // ep_group.size
        first_expert = experts * ep_group.rank
        gate_up = ParameterSpec(
            global_shape=(2 * config.ffn_hidden_size, config.hidden_size),
            group=group,
            partition_dim=0,
            partition_stride=2,
            init_std=config.init_method_std,
            is_expert=True,
            first_expert=first_expert,
        )
        down = ParameterSpec(
            global_shape=(config.hidden_size, config.ffn_hidden_size),
            group=group,
            partition_dim=1,
            init_std=output_std,
            is_expert=True,
            first_expert=first_expert,
        )
        self.linear_fc1 = _StackedWeight(gate_up, experts, config.dtype, device)
        self.linear_fc2 = _StackedWeight(down, experts, config.dtype, device)

    def forward(self, rows_RH: Tensor, probs_R: Tensor, offsets_E: Tensor) -> Tensor:
        """`probs_R` weights each row; `offsets_E` (int32) holds the end of each expert's rows."""
        gate_up_RF = grouped_gemm(rows_RH, self.linear_fc1.weight, offsets_E)
        activation_RF = weighted_swiglu(gate_up_RF, probs_R)
        if not self.recompute_activation:
            return grouped_gemm(activation_RF, self.linear_fc2.weight, offsets_E)
        with without_keeping(activation_RF, weighted_swiglu, gate_up_RF, probs_R):
            return grouped_gemm(activation_RF, self.linear_fc2.weight, offsets_E)
