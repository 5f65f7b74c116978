"""The global gradient norm, in which every parameter of the model counts once under every layout."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel.parameter import spec_of

# Elements whose squares are summed in float32, whose precision long sums would exceed; their sums are added in float64.
_CHUNK = 1 << 14


def counted_gradients(buffers: GradientBuffers, groups: ProcessGroups) -> list[Tensor]:
    """Flat views of the gradients that this rank counts: those of its own shard of each bucket.

    The shards of a bucket lie on different ranks whether the optimizer is distributed or not. Tensors that all
    tensor-parallel ranks hold whole are counted on the first one only.
    """
    views: list[Tensor] = []
    for bucket in buffers.buckets:
        run: slice | None = None  # padding within a run does no harm, it is zero
        for piece in bucket.pieces(bucket.own):
            spec = spec_of(piece.parameter)
            if spec.is_expert or spec.partition_dim is not None or groups.tp.is_first:
                run = slice(run.start if run else piece.offset, piece.offset + piece.end - piece.start)
            elif run is not None:
                views.append(bucket.grads[run])
                run = None
        if run is not None:
            views.append(bucket.grads[run])
    return views


def gradient_norm(counted: Iterable[Tensor], losses: Tensor, world: Group) -> float:
    """L2 norm of the gradients that all ranks counted, the same on each of them; not finite if a loss is not.

    `losses` is any scalar that is finite if this rank's losses are.
    """
    total = losses.detach().double() * 0
    for grads in counted:
        whole = grads.numel() // _CHUNK * _CHUNK
        wide = torch.promote_types(grads.dtype, torch.float32)
        for part in (grads[:whole].view(-1, _CHUNK), grads[whole:].view(1, -1)):
            if part.numel():
                total = total + torch.linalg.vector_norm(part, dim=1, dtype=wide).double().square().sum()
    if world.size > 1:
        dist.all_reduce(total, group=world.handle)
    return float(total.sqrt())
