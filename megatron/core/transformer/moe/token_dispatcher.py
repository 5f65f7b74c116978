"""Moving tokens to the ranks and rows of their experts, and back.

`dispatch` returns a frozen record that `combine` takes, so that nothing is hidden on the module between the two.
T tokens of this rank, K experts a token, R rows that this rank's experts work on. Ranks may hold any number of tokens,
and an expert or a rank may get none.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.config import ModelConfig
from megatron.core.fusions.permute import (
    PermutationMap,
    combine_rows,
    gather_probs,
    gather_rows,
    pad_rows,
    permutation_map,
)
from megatron.core.fusions.router import Routing
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import exchange


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What this rank's experts work on, and the way back."""

    tokens_TH: Tensor
    """Tokens that have come here, from this rank and from others."""
    probs_TK: Tensor
    """Weights of their choices."""
    index: PermutationMap
    """The rows, sorted by local expert, of those (token, choice) pairs whose expert is here."""
    departures: PermutationMap | None = None
    """The rows, sorted by expert, of this rank's own pairs, if each is sent by itself."""
    sent: tuple[int, ...] = ()
    """Rows sent to each expert-parallel rank."""
    received: tuple[int, ...] = ()
    """Rows received from each expert-parallel rank."""
    lengths: tuple[int, ...] = ()
    """Tokens, or rows received, of each rank whose tokens were gathered."""


GatherCounts = Callable[[Tensor, Group], Tensor]


class TokenDispatcher(ABC):
    """Brings tokens to their experts; the same result under every implementation.

    With `padded_microbatches` every expert gets as many rows as so many microbatches, whose tokens meet there, may have
    for it at most.

    Attributes:
        gather_counts: tells the host how many tokens go where; may be set again, where there are no values to count.
    """

    def __init__(self, padded_microbatches: int | None) -> None:
        self.padded_microbatches = padded_microbatches
        self.gather_counts: GatherCounts = exchange.gather_counts

    @abstractmethod
    def dispatch(self, x_TH: Tensor, routing: Routing) -> Dispatched:
        """Brings this rank's and other ranks' tokens to the experts here: x [T, H]."""

    @abstractmethod
    def combine(self, y_TH: Tensor, dispatched: Dispatched) -> Tensor:
        """From the experts' sums for `tokens_TH` to the sums of all experts for this rank's own tokens [T, H]."""

    def _padded(self, index: PermutationMap, experts_TK: Tensor, routing: Routing) -> PermutationMap:
        if self.padded_microbatches is None:
            return index
        assert routing.capacity is not None, "there is nothing to pad to without a capacity"
        return pad_rows(index, experts_TK, routing.capacity * self.padded_microbatches)


class LocalTokenDispatcher(TokenDispatcher):
    """Every rank of `group` holds the same tokens and a slice of every expert: tokens are only sorted.

    Each rank adds its part of the sum. In a group of one this is the single-device dispatcher.
    """

    def __init__(self, num_experts: int, group: Group, padded_microbatches: int | None = None) -> None:
        super().__init__(padded_microbatches)
        self.num_experts, self.group = num_experts, group

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Dispatched:
        """The tokens are here already."""
        # each rank's gradient of the tokens and of the probabilities is a part of a sum
        x_TH = mappings.copy_to_tensor_parallel(x_TH, self.group)
        probs_TK = mappings.copy_to_tensor_parallel(routing.probs_TK, self.group)
        dropped = routing.capacity is not None and self.padded_microbatches is None
        num_rows = int(self.gather_counts(routing.tokens_per_expert_E, Group()).sum()) if dropped else None
        index = permutation_map(routing.experts_TK, self.num_experts, num_rows)
        return Dispatched(tokens_TH=x_TH, probs_TK=probs_TK, index=self._padded(index, routing.experts_TK, routing))

    def combine(self, y_TH: Tensor, dispatched: Dispatched) -> Tensor:
        """Sums over the group."""
        return mappings.reduce_from_tensor_parallel(y_TH, self.group)


class AllGatherTokenDispatcher(TokenDispatcher):
    """All ranks of ep x etp get all tokens, and each takes those of its experts.

    A rank receives every other rank's T tokens, once for all K experts: the fewest bytes where there are at most K
    expert-parallel ranks. Waits for the device once (the counts), and not at all where every rank has all experts:
    there all must hold the same number of tokens.
    """

    def __init__(self, num_experts: int, *, ep: Group, ep_etp: Group, padded_microbatches: int | None = None) -> None:
        super().__init__(padded_microbatches)
        self.ep, self.ep_etp, self.local_experts = ep, ep_etp, num_experts // ep.size

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Dispatched:
        """x [T, H] -> all ranks' tokens."""
        first = self.ep.rank * self.local_experts
        lengths, num_rows = [x_TH.shape[0]] * self.ep_etp.size, None
        if self.ep.size > 1 or routing.capacity is not None:
            tokens = routing.experts_TK.new_full((1,), x_TH.shape[0])
            counts = torch.cat((tokens, routing.tokens_per_expert_E.to(torch.int64)))
            counts = self.gather_counts(counts, self.ep_etp)
            lengths = counts[:, 0].tolist()
            num_rows = int(counts[:, 1 + first : 1 + first + self.local_experts].sum())
        x_TH = exchange.gather_rows_of_ranks(x_TH, lengths, self.ep_etp)
        probs_TK = exchange.gather_rows_of_ranks(routing.probs_TK, lengths, self.ep_etp)
        experts_TK = exchange.gather_rows(routing.experts_TK, lengths, self.ep_etp) - first
        index = self._padded(permutation_map(experts_TK, self.local_experts, num_rows), experts_TK, routing)
        return Dispatched(tokens_TH=x_TH, probs_TK=probs_TK, index=index, lengths=tuple(lengths))

    def combine(self, y_TH: Tensor, dispatched: Dispatched) -> Tensor:
        """Sums over ranks; each keeps its own tokens."""
        return exchange.sum_rows_to_ranks(y_TH, dispatched.lengths, self.ep_etp)


class AllToAllTokenDispatcher(TokenDispatcher):
    """Each token is sent to the ranks of its K experts only.

    With experts split over `etp`, a row goes to the rank of the expert that has the sender's place in etp, and is
    gathered there by the others: the wider exchange (ep) carries every row once, the narrower one copies it. A rank
    waits for the device once (the counts).
    """

    def __init__(
        self, num_experts: int, *, ep: Group, etp: Group, ep_etp: Group, padded_microbatches: int | None = None
    ) -> None:
        super().__init__(padded_microbatches)
        self.num_experts, self.ep, self.etp, self.ep_etp = num_experts, ep, etp, ep_etp
        self.local_experts = num_experts // ep.size

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Dispatched:
        """x [T, H] -> one row for every pair, of any rank, whose expert is here."""
        counts = self.gather_counts(routing.tokens_per_expert_E.to(torch.int64), self.ep_etp)
        # sender's ep and etp rank, receiver's ep rank, expert there
        counts = counts.view(self.ep.size, self.etp.size, self.ep.size, self.local_experts)
        sent = counts[self.ep.rank, self.etp.rank].sum(dim=-1).tolist()
        received = counts[:, self.etp.rank, self.ep.rank].sum(dim=-1).tolist()
        arriving = counts[:, :, self.ep.rank].transpose(0, 1)  # [etp, ep, local expert], the order of arrival
        lengths = arriving.sum(dim=(1, 2)).tolist()

        departures = permutation_map(routing.experts_TK, self.num_experts, sum(sent))
        rows = exchange.all_to_all(gather_rows(x_TH, departures), sent, received, self.ep)
        rows = exchange.gather_rows_of_ranks(rows, lengths, self.etp)
        probs = exchange.all_to_all(gather_probs(routing.probs_TK, departures), sent, received, self.ep)
        probs = exchange.gather_rows_of_ranks(probs, lengths, self.etp)
        experts = self._experts_of(arriving, rows.device).unsqueeze(1)
        index = self._padded(permutation_map(experts, self.local_experts), experts, routing)
        return Dispatched(
            tokens_TH=rows, probs_TK=probs.unsqueeze(1), index=index, departures=departures,
            sent=tuple(sent), received=tuple(received), lengths=tuple(lengths),
        )  # fmt: skip

    def _experts_of(self, arriving: Tensor, device: torch.device) -> Tensor:
        """The local expert of every row, in the order of arrival."""
        experts = torch.arange(self.local_experts, device=device).expand(arriving.shape).reshape(-1)
        # counts are copied, and not the rows: a copy of many bytes out of ordinary memory waits for the device
        counts = arriving.reshape(-1).to(device, non_blocking=True)
        return experts.repeat_interleave(counts, output_size=int(arriving.sum()))

    def combine(self, y_TH: Tensor, dispatched: Dispatched) -> Tensor:
        """Sends every row back to its token's rank and sums there."""
        assert dispatched.departures is not None
        rows = exchange.sum_rows_to_ranks(y_TH, dispatched.lengths, self.etp)
        rows = exchange.all_to_all(rows, dispatched.received, dispatched.sent, self.ep)
        return combine_rows(rows, dispatched.departures)


def build_token_dispatcher(config: ModelConfig, groups: ProcessGroups, tokens_are_replicated: bool) -> TokenDispatcher:
    """The dispatcher for a layout; `tokens_are_replicated` says that tensor-parallel ranks hold the same tokens."""
    padded = None
    if config.moe_pad_expert_input_to_capacity:
        # the tokens of a microbatch are with tp x cp neighbours
        sharers = groups.tp.size * groups.cp.size
        padded = len({rank // sharers for rank in groups.ep_etp.ranks})
    if groups.ep_etp.size == 1 or tokens_are_replicated:
        assert groups.ep.size == 1, "without sequence parallelism experts are not shared out over tensor-parallel ranks"
        return LocalTokenDispatcher(config.num_experts, groups.etp, padded)
    if groups.ep.size == 1 or config.moe_token_dispatcher_type == "allgather":
        # with all experts everywhere, gathering tokens moves 1/K of what gathering their rows would
        return AllGatherTokenDispatcher(
            config.num_experts, ep=groups.ep, ep_etp=groups.ep_etp, padded_microbatches=padded
        )
    return AllToAllTokenDispatcher(
        config.num_experts, ep=groups.ep, etp=groups.etp, ep_etp=groups.ep_etp, padded_microbatches=padded
    )
