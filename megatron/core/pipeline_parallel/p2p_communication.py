"""Messages between neighbouring stages: hidden states to the next one, their gradients to the one before.

Each kind of message between two ranks has its own communicator. On a communicator, NCCL carries out operations in
the order in which they were begun, and both sides have to begin them in the same order. Hidden states and gradients, or
in an interleaved pipeline of two ranks hidden states in both directions, would have to take turns on a shared one
exactly as the other rank takes them; separate ones only carry messages in the order of the sends, which is the same on
both sides (`simulation` checks it), and so nothing ever waits behind an unrelated message.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import collectives
from megatron.core.parallel_state import Group, PipelineChannels
from megatron.core.pipeline_parallel.schedules import Forward, Pass


@dataclass
class Message:
    """A tensor that is being sent, in either direction."""

    _tensor: Tensor
    _work: dist.Work | None

    def finish(self) -> Tensor:
        """Returns the tensor once it may be used (on a GPU: for what is launched from now on)."""
        assert self._work is not None, "this process is not part of the channel"
        collectives.wait(self._work)
        return self._tensor


@dataclass(frozen=True)
class StageLink:
    """A rank's connections to its neighbours: all messages are of one shape."""

    channels: PipelineChannels
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def send(self, work: Pass, tensor: Tensor) -> Message:
        """Begins to send the result of a pass."""
        channel = self.channels.forward_out if isinstance(work, Forward) else self.channels.backward_out
        assert tensor.shape == self.shape and tensor.dtype == self.dtype, (tensor.shape, tensor.dtype)
        tensor = tensor.contiguous()
        return Message(tensor, collectives.isend(tensor, _other(channel), group=channel.handle))

    def receive(self, work: Pass) -> Message:
        """Begins to receive the input of a pass."""
        channel = self.channels.forward_in if isinstance(work, Forward) else self.channels.backward_in
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return Message(tensor, collectives.irecv(tensor, _other(channel), group=channel.handle))


def _other(channel: Group) -> int:
    """The rank at the other end of a channel."""
    assert channel.size == 2, "the pipeline has no neighbour there"
    return channel.ranks[1 - channel.rank]
