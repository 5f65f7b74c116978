"""The router, its auxiliary losses and the capacity of experts.

T = S*B tokens seen by this rank, E experts, K experts a token. With sequence and context parallelism the tokens of a
microbatch are spread evenly over `token_group`; losses and capacity are those of the whole microbatch.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megatron.core.config import ModelConfig
from megatron.core.fusions.capacity import within_capacity
from megatron.core.fusions.jitter import jittered, mixed
from megatron.core.fusions.linear import linear
from megatron.core.fusions.router import Routing, top_k_routing
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.mappings import all_gather_first, all_reduce, split_first
from megatron.core.tensor_parallel.parameter import ParameterSpec, Placement, new_parameter


class RouterStatistics(NamedTuple):
    """What one layer's router did with one microbatch, without gradient and without coefficients."""

    load_balancing_loss: Tensor
    """That of the configured type, see `TopKRouter`; 1 when balanced."""
    z_loss: Tensor
    """mean_t logsumexp_t^2."""
    tokens_per_expert: Tensor
    """[E] number of (token, choice) pairs that chose each expert, whether or not it had room for them."""


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
    """Chooses K experts for each token: x [S, B, H] -> Routing.

    With p the softmax over experts and count_e the pairs that chose expert e, the load-balancing loss is

        aux_loss         E/(K T^2) sum_e count_e sum_t p_te   over the T tokens of a microbatch (arXiv:2101.03961)
        seq_aux_loss     the same over the tokens of each sequence, then the mean over sequences
        global_aux_loss  E/T sum_e share_e sum_t p_te   where share_e, the part of all pairs that chose e, is that of
                         the previous step's whole batch (`expert_share`), and 1/E in the first step of a run

    averaged over microbatches and summed over layers. The counts have no gradient, so each is linear in p and its
    gradient is the same however tokens are spread over ranks and, but for `aux_loss`, over microbatches. (With the
    counts of the microbatches so far, as in Megatron-Core, `global_aux_loss` would depend on the data-parallel size.)

    An expert takes at most ceil(capacity factor * K T / E) pairs of a microbatch. Pairs beyond it are left out, which
    is decided over the whole microbatch, so neither does that depend on the layout; their tokens keep their other
    experts, with unchanged weights, or only the residual connection.

    With jitter (arXiv:2101.03961, section 2.2), what the router sees in training, but not the experts, is multiplied by
    noise.
    """

    expert_share: Tensor | None = None
    """[E], float: see `global_aux_loss`."""

    def __init__(
        self, config: ModelConfig, layer_number: int, spec: ParameterSpec, token_group: Group, placement: Placement
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.moe_router_topk
        self.balancing = config.moe_router_load_balancing_type
        self.aux_loss_coeff = config.moe_aux_loss_coeff if self.balancing != "none" else 0.0
        self.z_loss_coeff = config.moe_z_loss_coeff
        self.capacity_factor, self.drop_policy = config.moe_expert_capacity_factor, config.moe_token_drop_policy
        self.jitter_eps, self.layer_number = config.moe_input_jitter_eps or 0.0, layer_number
        self.token_group, self.sequence_group = token_group, placement.sequence_group
        self.weight = new_parameter(spec, placement)

    def forward(self, x_SBH: Tensor, microbatch: Microbatch) -> tuple[Routing, RouterStatistics]:
        """Routes this rank's tokens in float32 or wider; those of the result are numbered s * B + b."""
        x_TH, batch = x_SBH.flatten(0, 1), x_SBH.shape[1]
        if self.jitter_eps and self.training:
            x_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
            x_TH = jittered(x_TH, self._keys(batch, microbatch), self.jitter_eps)
        logits_TE = linear(x_TH, self.weight, torch.promote_types(x_TH.dtype, torch.float32))
        routing = top_k_routing(logits_TE, self.top_k)
        loss, statistics = self._auxiliary_losses(routing, batch)
        if loss is not None and torch.is_grad_enabled():
            scale = microbatch.factors.auxiliary
            routing = routing._replace(probs_TK=_AttachLoss.apply(routing.probs_TK, loss, scale))
        if self.capacity_factor is not None:
            places_S = self._places(microbatch)
            order_T = (places_S.unsqueeze(1) * batch + torch.arange(batch, device=x_TH.device)).flatten()
            routing = self._within_capacity(routing, order_T, self.capacity_factor)
        return routing, statistics

    def _places(self, microbatch: Microbatch) -> Tensor:
        """int64 [S], where the tokens that this rank routes stand in their samples."""
        assert microbatch.places is not None, "the block says where tokens stand"
        return split_first(microbatch.places, self.sequence_group)

    def _keys(self, batch: int, microbatch: Microbatch) -> Tensor:
        """A number for each token that depends on the seed, the layer, the sample and the position alone."""
        places_S = self._places(microbatch)
        samples_B = microbatch.first_sample + torch.arange(batch, device=places_S.device)
        run = torch.tensor(microbatch.seed)  # stays on the host, as an argument of the kernel that adds it
        keys_B = mixed(mixed(mixed(run) + self.layer_number) + samples_B)
        return (mixed(keys_B) + places_S.unsqueeze(1)).flatten()

    def _auxiliary_losses(self, routing: Routing, batch: int) -> tuple[Tensor | None, RouterStatistics]:
        """The weighted loss of this rank's tokens (None without coefficients), and the microbatch's statistics."""
        # the load is balanced within each of G sets of tokens
        sets = batch if self.balancing == "seq_aux_loss" else 1
        tokens = routing.softmax_TE.shape[0] * self.token_group.size
        mass_GE = routing.softmax_TE.unflatten(0, (-1, sets)).sum(dim=0)
        counts_GE = routing.tokens_per_expert_E.unsqueeze(0)
        if sets > 1:
            numbers_E = torch.arange(self.num_experts, device=mass_GE.device)
            chosen = routing.experts_TK.unflatten(0, (-1, sets)).unsqueeze(-1) == numbers_E
            counts_GE = chosen.sum(dim=(0, 2)).to(mass_GE.dtype)
        squared_logsumexp = routing.logsumexp_T.square().sum()
        local = torch.cat((counts_GE.flatten(), mass_GE.detach().flatten(), squared_logsumexp.detach().reshape(1)))
        counts, mass, total_squared = all_reduce(local, self.token_group).split((counts_GE.numel(), mass_GE.numel(), 1))
        counts_GE = counts.view_as(counts_GE)
        tokens_of_set = tokens // sets
        share_GE = counts_GE / (self.top_k * tokens_of_set)
        if self.balancing == "global_aux_loss":
            share_GE = torch.full_like(share_GE, 1 / self.num_experts)
            if self.expert_share is not None:
                share_GE = self.expert_share.to(share_GE).unsqueeze(0)
        factor = self.num_experts / (tokens_of_set * sets)
        statistics = RouterStatistics(
            load_balancing_loss=factor * torch.dot(share_GE.flatten(), mass),
            z_loss=total_squared[0] / tokens,
            tokens_per_expert=counts_GE.sum(dim=0),
        )
        loss = None
        if self.aux_loss_coeff:
            loss = self.aux_loss_coeff * factor * torch.dot(share_GE.flatten(), mass_GE.flatten())
        if self.z_loss_coeff:
            z_loss = self.z_loss_coeff * squared_logsumexp / tokens
            loss = z_loss if loss is None else loss + z_loss
        return loss, statistics

    def _within_capacity(self, routing: Routing, order_T: Tensor, factor: float) -> Routing:
        """Leaves out pairs beyond the experts' capacity; `order_T` numbers the tokens through the microbatch."""
        experts_TK = all_gather_first(routing.experts_TK, self.token_group)
        order = all_gather_first(order_T, self.token_group).argsort()
        capacity = math.ceil(factor * experts_TK.numel() / self.num_experts)
        priority_TK = None
        if self.drop_policy == "probs":
            priority_TK = all_gather_first(routing.probs_TK.detach(), self.token_group)[order]
        kept = within_capacity(experts_TK[order], self.num_experts, capacity, priority_TK)
        kept_TK = split_first(torch.empty_like(kept).index_copy_(0, order, kept), self.token_group)
        experts_TK = torch.where(kept_TK, routing.experts_TK, self.num_experts)
        numbers_E = torch.arange(self.num_experts, device=experts_TK.device)
        counts_E = (experts_TK.unsqueeze(-1) == numbers_E).sum(dim=(0, 1)).to(routing.tokens_per_expert_E.dtype)
        return routing._replace(experts_TK=experts_TK, tokens_per_expert_E=counts_E, capacity=capacity)
