"""Faults that no run on a CPU shows, to see that the pretended device does."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from megatron.core import collectives
from megatron.core.fusions.kernels.triton import permute, persistent_gradient
from megatron.core.microbatch import Microbatch
from megatron.core.optimizer import offload
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.schedules import Pass
from megatron.core.transformer import transformer_block
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.norm import RMSNorm

Plant = Callable[[], AbstractContextManager[Any]]


def _index_on_the_host() -> AbstractContextManager[Any]:
    """The positions of the tokens are made in the host's memory."""
    positions = transformer_block.positions

    def on_the_host(length: int, cp: Any, device: torch.device) -> Tensor:
        return positions(length, cp, torch.device("cpu"))

    return mock.patch.object(transformer_block, "positions", on_the_host)


def _receives_on_the_host() -> AbstractContextManager[Any]:
    """Hidden states are received in the host's memory."""
    receive = p2p_communication.StageLink.receive

    def on_the_host(link: p2p_communication.StageLink, work: Pass) -> p2p_communication.Message:
        host = p2p_communication.StageLink(link.channels, link.shape, link.dtype, torch.device("cpu"))
        return receive(host, work)

    return mock.patch.object(p2p_communication.StageLink, "receive", on_the_host)


def _number_read() -> AbstractContextManager[Any]:
    """Every norm looks at a number."""
    forward = RMSNorm.forward

    def and_read(norm: RMSNorm, x: Tensor) -> Tensor:
        y = forward(norm, x)
        y[0, 0, 0].item()
        return y

    return mock.patch.object(RMSNorm, "forward", and_read)


def _shape_by_value() -> AbstractContextManager[Any]:
    """Tokens are chosen by a mask, whose number of entries the host has to know."""
    forward = MoELayer.forward

    def and_choose(layer: MoELayer, x: Tensor, microbatch: Microbatch) -> Any:
        x[x > 0]
        return forward(layer, x, microbatch)

    return mock.patch.object(MoELayer, "forward", and_choose)


def _unaligned_rows() -> AbstractContextManager[Any]:
    """Rows begin at the second element of their storage."""
    forward = RMSNorm.forward

    def moved(norm: RMSNorm, x: Tensor) -> Tensor:
        return forward(norm, x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x))

    return mock.patch.object(RMSNorm, "forward", moved)


def _tall_grid() -> AbstractContextManager[Any]:
    """More blocks along the second axis than a device has numbers for."""
    return mock.patch.object(permute, "BLOCK_COLUMNS", 512 / 2**17)


def _strided_message() -> AbstractContextManager[Any]:
    """What is gathered is read through its strides."""
    gather = collectives.all_gather_single

    def transposed(out: Tensor, x: Tensor, **options: Any) -> Any:
        return gather(out, x.transpose(0, -1).contiguous().transpose(0, -1), **options)

    return mock.patch.object(collectives, "all_gather_single", transposed)


def _descriptors_of_one_thread() -> AbstractContextManager[Any]:
    """What allocates descriptors is set once, in the thread that begins, and not in those of autograd."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    return mock.patch.object(persistent_gradient.triton, "set_allocator", lambda allocator: None)


def _copies_in_turn() -> AbstractContextManager[Any]:
    """Gradients and weights of the state on the host are copied in the stream that everything else is in."""

    def in_turn(copies: offload.StreamCopies, target: Tensor, source: Tensor, after: Any = ()) -> Any:
        target.copy_(source, non_blocking=True)
        return torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True))

    return mock.patch.object(offload.StreamCopies, "copy", in_turn)


PLANTED: dict[str, Plant] = {
    "index on the host": _index_on_the_host,
    "receives on the host": _receives_on_the_host,
    "number read": _number_read,
    "shape by value": _shape_by_value,
    "unaligned rows": _unaligned_rows,
    "tall grid": _tall_grid,
    "strided message": _strided_message,
    "descriptors of one thread": _descriptors_of_one_thread,
    "copies in turn": _copies_in_turn,
}
