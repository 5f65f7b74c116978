"""Moving tokens to the ranks and rows of their experts, and back.

`dispatch` returns a frozen record that `combine` takes, so that nothing is hidden on the module between the two.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron.core.fusions.permute import PermutationMap, combine_rows, gather_probs, gather_rows, permutation_map
from megatron.core.fusions.router import Routing
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel import mappings


@dataclass(frozen=True)
class Dispatched:
    """Rows sorted by local expert: the input of the experts, and the way back."""

    rows_RH: Tensor
    probs_R: Tensor
    index: PermutationMap


class LocalTokenDispatcher:
    """Every rank holds (a slice of) every expert: tokens only have to be gathered and sorted, none is dropped.

    With the experts' matrices split over `group`, its ranks all work on the same tokens and each adds its part of
    the sum; with sequence parallelism they first gather the tokens and in the end each keep their own.
    """

    def __init__(self, num_experts: int, *, group: Group, sequence_parallel: bool) -> None:
        self.num_experts, self.group, self.sequence_parallel = num_experts, group, sequence_parallel

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Dispatched:
        """Sorts copies of the tokens by expert: x [T, H] -> rows [T*tp*K, H] with SP, [T*K, H] without."""
        probs, experts = routing.probs_TK, routing.experts_TK
        if self.sequence_parallel:
            x_TH = mappings.gather_from_sequence_parallel(x_TH, self.group)
            probs = mappings.gather_from_sequence_parallel(probs, self.group)
            experts = mappings.all_gather_first(experts, self.group)
        else:
            # each rank's gradient of the tokens and of the probabilities is a part of a sum
            x_TH = mappings.copy_to_tensor_parallel(x_TH, self.group)
            probs = mappings.copy_to_tensor_parallel(probs, self.group)
        index = permutation_map(experts, self.num_experts)
        return Dispatched(gather_rows(x_TH, index), gather_probs(probs, index), index)

    def combine(self, y_RH: Tensor, dispatched: Dispatched) -> Tensor:
        """Sums the experts' outputs of each token, over its K rows and over the group: rows [R, H] -> [T, H]."""
        y_TH = combine_rows(y_RH, dispatched.index)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel(y_TH, self.group)
        return mappings.reduce_from_tensor_parallel(y_TH, self.group)
