"""Causal self-attention with grouped queries (arXiv:2305.13245) and rotary positions.

Heads are split over tensor-parallel ranks, the sequence over context-parallel ranks.
"""

from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.context_parallel.ring_attention import ring_attention
from megatron.core.fusions.attention import causal_attention
from megatron.core.fusions.rotary import apply_rotary
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import Group
from megatron.core.recompute import recomputed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.parameter import Placement, Specs


class SelfAttention(nn.Module):
    """Attention over one sequence: [S/cp, B, H] (or [S/cp/tp, B, H]) -> the same shape."""

    def __init__(
        self, config: ModelConfig, specs: Specs, placement: Placement, *, cp: Group, recompute_core: bool
    ) -> None:
        super().__init__()
        self.cp, self.recompute_core = cp, recompute_core
        self.head_dim = config.head_dim
        self.local_groups = config.query_groups // placement.group.size
        self.queries_per_group = config.num_attention_heads // config.query_groups
        self.linear_qkv = ColumnParallelLinear(specs["linear_qkv.weight"], placement)
        self.linear_proj = RowParallelLinear(specs["linear_proj.weight"], placement)

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """Attends within each sample, or within each of its documents if there are any."""
        qkv = self.linear_qkv(x)
        context = recomputed(self._core, qkv, microbatch) if self.recompute_core else self._core(qkv, microbatch)
        return self.linear_proj(context)

    def _core(self, qkv: Tensor, microbatch: Microbatch) -> Tensor:
        """Everything between the two products: [S/cp, B, (heads + 2 groups) d] -> [S/cp, B, heads d], per TP rank."""
        sequence, batch, _ = qkv.shape
        qkv = qkv.view(sequence, batch, self.local_groups, self.queries_per_group + 2, self.head_dim)
        # for each key/value group its query heads, its key, its value
        query, key, value = qkv.split((self.queries_per_group, 1, 1), dim=3)
        # [S, B, groups, n, d] -> [B, heads, S, d]
        query, key, value = (part.flatten(2, 3).permute(1, 2, 0, 3) for part in (query, key, value))
        assert microbatch.rotary is not None, "the block makes the rotary tables"
        query, key = apply_rotary(query, *microbatch.rotary), apply_rotary(key, *microbatch.rotary)
        if self.cp.size == 1:
            context = causal_attention(query, key, value, microbatch.documents)
        else:
            assert microbatch.documents is None, "documents are not kept apart in a split sequence"
            context = ring_attention(query, key, value, self.cp)
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
