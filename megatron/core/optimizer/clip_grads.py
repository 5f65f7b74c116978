"""The global gradient norm, in which every parameter of the model counts once under every layout."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core import collectives
from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel.parameter import spec_of
from megatron.core.waiting import waiting

# Elements whose squares are summed in float32, whose precision long sums would exceed; their sums are added in float64.
_CHUNK = 1 << 14


class OwnGradients(NamedTuple):
    """Flat views of the gradients in this rank's own shard of each bucket."""

    counted: list[Tensor]
    """Those that this rank adds to the norm."""
    watched: list[Tensor]
    """Those that another rank adds, which must be finite here too."""


def own_gradients(buffers: GradientBuffers, groups: ProcessGroups) -> OwnGradients:
    """What this rank counts and watches.

    The shards of a bucket lie on different ranks whether the optimizer is distributed or not. Tensors that all
    tensor-parallel ranks hold whole are counted on the first one only.
    """
    own = OwnGradients([], [])
    for bucket in buffers.buckets:
        runs: list[tuple[list[Tensor], slice]] = []  # padding within a run does no harm, it is zero
        for piece in bucket.pieces(bucket.own):
            spec = spec_of(piece.parameter)
            counts = spec.is_expert or spec.partition_dim is not None or groups.tp.is_first
            views, start = own.counted if counts else own.watched, piece.offset
            if runs and runs[-1][0] is views:
                start = runs.pop()[1].start
            runs.append((views, slice(start, piece.offset + piece.end - piece.start)))
        for views, run in runs:
            views.append(bucket.grads[run])
    return own


def _sum_of_squares(grads: Tensor) -> Tensor:
    """In float64: [n] -> []."""
    whole = grads.numel() // _CHUNK * _CHUNK
    wide = torch.promote_types(grads.dtype, torch.float32)
    parts = [part for part in (grads[:whole].view(-1, _CHUNK), grads[whole:].view(1, -1)) if part.numel()]
    squares = [torch.linalg.vector_norm(part, dim=1, dtype=wide).double().square().sum() for part in parts]
    return torch.stack(squares).sum()


def gradient_norm(own: OwnGradients, losses: Tensor, world: Group) -> float:
    """L2 norm of the gradients that all ranks counted, the same on each of them.

    It is not finite if any rank has a gradient or a loss that is not; `losses` is any scalar that is finite if this
    rank's losses are.
    """
    total = losses.detach().double() * 0
    for grads in own.counted:
        total = total + _sum_of_squares(grads)
    for grads in own.watched:
        total = total + 0 * _sum_of_squares(grads)
    if world.size > 1:
        collectives.all_reduce(total, group=world.handle)
    with waiting("the device"):
        return float(total.sqrt())
