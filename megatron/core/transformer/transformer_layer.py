"""One layer: attention and experts, each behind a norm and beside a residual connection."""

import math

import torch
from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.fusions.attention import Documents
from megatron.core.parallel_state import ProcessGroups
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import RouterStatistics
from megatron.core.transformer.norm import RMSNorm


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)): [S, B, H] (or [S/tp, B, H]) -> the same shape."""

    def __init__(
        self, config: ModelConfig, *, groups: ProcessGroups, sequence_parallel: bool, device: torch.device
    ) -> None:
        super().__init__()
        # Matrices that write to the residual stream start smaller, so that its variance does not grow with depth
        # (GPT-2, as in Megatron-LM).
        output_std = config.init_method_std / math.sqrt(2 * config.num_layers)

        def norm() -> RMSNorm:
            return RMSNorm(
                config.hidden_size,
                epsilon=config.norm_epsilon,
                sequence_parallel=sequence_parallel,
                dtype=config.dtype,
                device=device,
            )

        self.input_layernorm = norm()
        self.self_attention = SelfAttention(
            config,
            output_std=output_std,
            group=groups.tp,
            cp=groups.cp,
            sequence_parallel=sequence_parallel,
            device=device,
        )
        self.pre_mlp_layernorm = norm()
        self.mlp = MoELayer(
            config, output_std=output_std, groups=groups, sequence_parallel=sequence_parallel, device=device
        )

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        auxiliary_loss_scale: float,
        documents: Documents | None = None,
    ) -> tuple[Tensor, RouterStatistics]:
        """Returns the new residual stream and what the router did."""
        x = x + self.self_attention(self.input_layernorm(x), rotary, documents)
        y, statistics = self.mlp(self.pre_mlp_layernorm(x), auxiliary_loss_scale)
        return x + y, statistics
