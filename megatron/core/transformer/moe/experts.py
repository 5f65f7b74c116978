"""All experts of a rank, on stacked weights."""

from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.fusions.expert_mlp import expert_mlp
from megatron.core.fusions.forms import takes_grouped_mm
from megatron.core.fusions.linear import Backend, WgradBackend
from megatron.core.fusions.permute import PermutationMap
from megatron.core.tensor_parallel.parameter import ParameterSpec, Placement, Specs, new_parameter


class _StackedWeight(nn.Module):
    """One matrix for each local expert, stacked: [experts, out, in]."""

    def __init__(self, spec: ParameterSpec, placement: Placement) -> None:
        super().__init__()
        self.weight = new_parameter(spec, placement)


class Experts(nn.Module):
    """SwiGLU experts: tokens [T, H] -> [T, H], summed over the experts here (a part of the sum over ranks).

    `backend` and `wgrad_backend` may be set again, to what has been measured; `takes_grouped_mm` says whether there is
    a choice of the former.
    """

    def __init__(self, config: ModelConfig, specs: Specs, placement: Placement) -> None:
        super().__init__()
        self.linear_fc1 = _StackedWeight(specs["linear_fc1.weight"], placement)
        self.linear_fc2 = _StackedWeight(specs["linear_fc2.weight"], placement)
        self.backend: Backend = config.moe_grouped_gemm_backend
        self.wgrad_backend: WgradBackend = config.moe_grouped_wgrad_backend
        _, hidden, width = self.linear_fc2.weight.shape
        self.takes_grouped_mm = takes_grouped_mm(config.dtype, hidden, width)
        if self.backend == "grouped_mm" and not self.takes_grouped_mm:
            raise ValueError(
                f"--moe-grouped-gemm-backend grouped_mm does not take experts of {config.params_dtype}, {width} x "
                f"{hidden} on a rank: it wants 16 or 32 bits and rows of a multiple of 16 bytes, so leave "
                "it at auto"
            )

    def forward(self, x_TH: Tensor, probs_TK: Tensor, index: PermutationMap) -> Tensor:
        """`probs_TK` weights each token's choices; `index` knows which of them are for experts here."""
        weights = self.linear_fc1.weight, self.linear_fc2.weight
        return expert_mlp(x_TH, probs_TK, index, *weights, self.backend, self.wgrad_backend)
