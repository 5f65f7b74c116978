"""The router and its auxiliary losses.

T tokens seen by this rank, E experts, K experts a token. With sequence and context parallelism a microbatch's tokens
are spread over `token_group`; the losses are those of the whole microbatch.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megatron.core.config import ModelConfig
from megatron.core.fusions.router import Routing, top_k_routing
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.mappings import all_reduce
from megatron.core.tensor_parallel.parameter import ParameterSpec, new_parameter


class RouterStatistics(NamedTuple):
    """What one layer's router did with one microbatch, without gradient and without coefficients."""

    load_balancing_loss: Tensor
    """E/(K T^2) sum_e count_e sum_t p_te; 1 when balanced."""
    z_loss: Tensor
    """mean_t logsumexp_t^2."""
    tokens_per_expert: Tensor
    """[E] number of (token, choice) pairs sent to each expert."""


class _AttachLoss(Function):
    """Identity on `x` whose backward also sends `scale` into an auxiliary loss.

    Only the last pipeline stage has a loss to call backward on; this makes an auxiliary loss of any layer part of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss_like = scale, loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full_like(ctx.loss_like, ctx.scale), None


class TopKRouter(nn.Module):
    """Chooses K experts for each token: x [T, H] -> Routing."""

    def __init__(
        self, config: ModelConfig, *, token_group: Group, sequence_parallel: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.moe_router_topk
        balanced = config.moe_router_load_balancing_type == "aux_loss"
        self.aux_loss_coeff = config.moe_aux_loss_coeff if balanced else 0.0
        self.z_loss_coeff = config.moe_z_loss_coeff
        self.token_group = token_group
        spec = ParameterSpec(
            global_shape=(config.num_experts, config.hidden_size),
            init_std=config.init_method_std,
            sequence_partial_grad=sequence_parallel,
        )
        self.weight = new_parameter(spec, config.dtype, device)

    def forward(self, x_TH: Tensor, auxiliary_loss_scale: float) -> tuple[Routing, RouterStatistics]:
        """Routes in float32 or wider; `auxiliary_loss_scale` is the share of this microbatch in the step's loss."""
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        routing = top_k_routing(F.linear(x_TH.to(wide), self.weight.to(wide)), self.top_k)
        loss, statistics = self._auxiliary_losses(routing)
        if loss is not None and torch.is_grad_enabled():
            routing = routing._replace(probs_TK=_AttachLoss.apply(routing.probs_TK, loss, auxiliary_loss_scale))
        return routing, statistics

    def _auxiliary_losses(self, routing: Routing) -> tuple[Tensor | None, RouterStatistics]:
        """The weighted loss of this rank's tokens (None without coefficients), and the microbatch's statistics."""
        tokens = routing.probs_TK.shape[0] * self.token_group.size
        mass_E = routing.softmax_TE.sum(dim=0)
        squared_logsumexp = routing.logsumexp_T.square().sum()
        local = torch.cat((routing.tokens_per_expert_E, mass_E.detach(), squared_logsumexp.detach().reshape(1)))
        counts_E, total_mass_E, total_squared = all_reduce(local, self.token_group).split(
            (self.num_experts, self.num_experts, 1)
        )
        factor = self.num_experts / (self.top_k * tokens**2)
        statistics = RouterStatistics(
            load_balancing_loss=factor * torch.dot(counts_E, total_mass_E),
            z_loss=total_squared[0] / tokens,
            tokens_per_expert=counts_E,
        )
        loss = None
        if self.aux_loss_coeff:
            loss = self.aux_loss_coeff * factor * torch.dot(counts_E, mass_E)
        if self.z_loss_coeff:
            z_loss = self.z_loss_coeff * squared_logsumexp / tokens
            loss = z_loss if loss is None else loss + z_loss
        return loss, statistics
