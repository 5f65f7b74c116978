"""The mixture-of-experts layer (Mixtral, arXiv:2401.04088)."""

from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import Placement, Specs, specs_of
from megatron.core.transformer.moe.experts import Experts
from megatron.core.transformer.moe.router import RouterStatistics, TopKRouter
from megatron.core.transformer.moe.token_dispatcher import build_token_dispatcher


class MoELayer(nn.Module):
    """Router, dispatch, experts, combine: [S, B, H] (or [S/tp, B, H]) -> the same shape."""

    def __init__(
        self, config: ModelConfig, layer_number: int, specs: Specs, groups: ProcessGroups, placement: Placement
    ) -> None:
        super().__init__()
        token_group = groups.tp_cp if placement.sequence_parallel else groups.cp
        self.router = TopKRouter(config, layer_number, specs["router.weight"], token_group, placement)
        self.experts = Experts(config, specs_of("experts", specs), placement)
        replicated = groups.tp.size > 1 and not placement.sequence_parallel
        self.dispatcher = build_token_dispatcher(config, groups, tokens_are_replicated=replicated)

    def forward(self, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, RouterStatistics]:
        """Returns the experts' output and what the router did."""
        routing, statistics = self.router(x, microbatch)
        dispatched = self.dispatcher.dispatch(x.flatten(0, 1), routing)
        y_TH = self.experts(dispatched.tokens_TH, dispatched.probs_TK, dispatched.index)
        return self.dispatcher.combine(y_TH, dispatched).view_as(x), statistics
