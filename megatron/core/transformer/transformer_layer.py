"""One layer: attention and experts, each behind a norm, with a residual connection."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import ProcessGroups
from megatron.core.recompute import RecomputeConfig, recomputed, without_keeping
from megatron.core.tensor_parallel.parameter import Placement, Specs, specs_of
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import RouterStatistics
from megatron.core.transformer.norm import RMSNorm


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)): [S, B, H] (or [S/tp, B, H]) -> the same shape."""

    def __init__(
        self,
        config: ModelConfig,
        layer_number: int,
        specs: Specs,
        groups: ProcessGroups,
        placement: Placement,
        recompute: RecomputeConfig,
    ) -> None:
        super().__init__()
        self.recompute_norm, self.recompute_moe = recompute.includes("layernorm"), recompute.includes("moe")
        self.input_layernorm = RMSNorm(specs["input_layernorm.weight"], config.norm_epsilon, placement)
        attention_specs, again = specs_of("self_attention", specs), recompute.includes("core_attn")
        self.self_attention = SelfAttention(config, attention_specs, placement, cp=groups.cp, recompute_core=again)
        self.pre_mlp_layernorm = RMSNorm(specs["pre_mlp_layernorm.weight"], config.norm_epsilon, placement)
        self.mlp = MoELayer(config, layer_number, specs_of("mlp", specs), groups, placement)

    def forward(self, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, RouterStatistics]:
        """Returns the new residual stream and what the router did."""
        with self._norm(self.input_layernorm, x) as normalized:
            x = x + self.self_attention(normalized, microbatch)
        if self.recompute_moe:
            y, statistics = recomputed(self._experts, x, microbatch)
        else:
            with self._norm(self.pre_mlp_layernorm, x) as normalized:
                y, statistics = self.mlp(normalized, microbatch)
        return x + y, statistics

    @contextmanager
    def _norm(self, norm: RMSNorm, x: Tensor) -> Iterator[Tensor]:
        """The normalised `x`; if norms are computed again, what uses it within does not keep it."""
        normalized = norm(x)
        with without_keeping(normalized, norm, x) if self.recompute_norm else nullcontext():
            yield normalized

    def _experts(self, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, RouterStatistics]:
        return self.mlp(self.pre_mlp_layernorm(x), microbatch)
