"""Exchanging rows between ranks that hold different numbers of them.

The numbers are known to every rank beforehand (`gather_counts`), so that nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core import collectives
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel import mappings
from megatron.core.waiting import to_host


def gather_counts(counts: Tensor, group: Group) -> Tensor:
    """Every rank's `counts` [n], on the CPU: [ranks, n]; this waits for the device."""
    return to_host(mappings.all_gather_first(counts.unsqueeze(0), group))


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Sends the first `sent[0]` rows to rank 0 and so on; returns what ranks 0, 1, ... sent, one after the other."""
    return mappings.conjugate(
        x, group, lambda x: _exchange(x, sent, received, group), lambda grad: _exchange(grad, received, sent, group)
    )


def gather_rows_of_ranks(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """Joins the rows of all ranks: [lengths[rank], ...] -> [sum(lengths), ...]; backward sums the ranks' gradients."""
    return mappings.conjugate(
        x, group, lambda x: gather_rows(x, lengths, group), lambda grad: _sum_rows(grad, lengths, group)
    )


def sum_rows_to_ranks(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """This rank's rows of the sum over ranks: [sum(lengths), ...] -> [lengths[rank], ...]; backward gathers."""
    return mappings.conjugate(
        x, group, lambda x: _sum_rows(x, lengths, group), lambda grad: gather_rows(grad, lengths, group)
    )


def _exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    collectives.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group.handle)
    return out


def gather_rows(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """`gather_rows_of_ranks` without gradient."""
    if len(set(lengths)) == 1:
        return mappings.all_gather_first(x, group)
    # every rank is sent all rows of this one
    return _exchange(x.repeat(group.size, *(1,) * (x.dim() - 1)), [x.shape[0]] * group.size, lengths, group)


def _sum_rows(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    if len(set(lengths)) == 1:
        return mappings.reduce_scatter_first(x, group)
    own = lengths[group.rank]
    parts = _exchange(x, lengths, [own] * group.size, group).view(group.size, own, *x.shape[1:])
    return parts.sum(dim=0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
