"""Optimizer state in the host's memory, updated there while gradients come down and weights go up in pieces.

As in ZeRO-Offload (arXiv:2101.06840), masters and moments of a share of the parameters never visit the device. Their
gradients and weights do not stay on the host either: they pass through two small buffers, one of which is copied while
the other is worked on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.core.distributed.gradient_buffers import ALIGNMENT
from megatron.core.host_memory import HostMemory
from megatron.core.optimizer.update_rule import Segment
from megatron.core.waiting import waiting

PIECE = 1 << 23
"""Elements that are copied, and updated on the host, at a time; a multiple of ALIGNMENT."""
_BUFFERS = 2


class Copied(Protocol):
    """The end of a copy that may still be under way."""

    def synchronize(self) -> None:
        """Lets the host wait for it."""


class Copies(Protocol):
    """Copies between host and device, made in the order in which they are asked for."""

    def follow(self) -> None:
        """Lets what is copied from now on wait for all that the device has been given to do."""

    def lead(self) -> None:
        """Lets the device do nothing more until all that was asked for is copied."""

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Any] = ()) -> Copied:
        """Begins to copy once what `copy` returned before, for either direction, is over."""


class StreamCopies:
    """A stream of a CUDA device for copies in one direction."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def follow(self) -> None:
        """See `Copies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def lead(self) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Any] = ()) -> Copied:
        """See `Copies`."""
        with torch.cuda.stream(self._stream):
            for event in after:
                self._stream.wait_event(event)
            target.copy_(source, non_blocking=True)
            # a host that waits must leave its core to the threads of the update
            return self._stream.record_event(torch.cuda.Event(blocking=True))


class ImmediateCopies:
    """For a device that does everything at once, as torch's meta device."""

    def follow(self) -> None:
        """Nothing is under way."""

    def lead(self) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Any] = ()) -> Copied:
        """See `Copies`."""
        target.copy_(source)
        return self


def new_copies(device: torch.device) -> Copies | None:
    """For one direction; None if the device is the host, which needs no copies."""
    if device.type == "cpu":
        return None
    return StreamCopies(device) if device.type == "cuda" else ImmediateCopies()


def on_the_host(sizes: Iterable[int], fraction: float) -> list[int]:
    """How many of the first elements of each bucket's part of this rank have their state on the host.

    Buckets are taken in their order, from the end of the model, until `fraction` of all elements is reached: those
    gradients are there first, and those weights are needed last. All but one bucket are whole.
    """
    sizes = list(sizes)
    left = int(sum(sizes) * fraction) // ALIGNMENT * ALIGNMENT
    shares = []
    for size in sizes:
        shares.append(min(size, left))
        left -= shares[-1]
    return shares


def parts(segment: Segment) -> Iterator[Segment]:
    """A segment in pieces of bounded size."""
    size = segment.grad.numel()
    for start in range(0, size, PIECE):
        yield segment.part(start, min(start + PIECE, size))


@dataclass(eq=False)
class _Stage:
    """A buffer that one piece at a time passes through; in bytes."""

    grad: Tensor
    weights: Tensor
    arrived: list[Copied]
    """What the update has to wait for."""
    left: list[Copied]
    """What has to be over before the weights are overwritten."""

    def load(self, part: Segment, down: Copies) -> None:
        """Begins to bring down what the update of a part reads."""
        self.arrived = [down.copy(_typed(self.grad, part.grad), part.grad)]
        if part.weights is None:  # where these come down to, the weights of the piece before go up from
            weights = _passing_weights(part)
            self.arrived.append(down.copy(_typed(self.weights, weights), weights, after=self.left))

    def update(self, part: Segment, rule: Callable[[Segment], None], up: Copies) -> None:
        """Updates a part that was loaded, and begins to bring its weights up."""
        self._await(self.arrived)
        self._await(self.left)
        target = _passing_weights(part)
        weights = _typed(self.weights, target)
        rule(_staged(part, _typed(self.grad, part.grad), weights))
        self.left = [up.copy(target, weights)]

    @staticmethod
    def _await(copies: list[Copied]) -> None:
        with waiting("the device"):
            for copied in copies:
                copied.synchronize()
        copies.clear()


def _passing_weights(part: Segment) -> Tensor:
    """The weights on the device that an update sets."""
    if part.weights is not None:
        return part.weights
    return part.master.data if part.master.weights is None else part.master.weights


def _staged(part: Segment, grad: Tensor, weights: Tensor) -> Segment:
    """The part with what is on the device replaced by what has come down."""
    part = replace(part, grad=grad)
    if part.weights is not None:
        return replace(part, weights=weights)
    master = part.master
    return replace(
        part, master=replace(master, data=weights) if master.weights is None else replace(master, weights=weights)
    )


def _typed(buffer: Tensor, like: Tensor) -> Tensor:
    """The first bytes of a buffer as a tensor [n] of another's type and size."""
    return buffer[: like.nbytes].view(like.dtype)


class HostUpdates:
    """The updates of segments whose state is in the host's memory, and whose gradients and weights are on the device.

    Of a segment whose masters are the weights, or hold them, these come down with the gradients. Where the device is
    the host, everything is updated where it is.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        device: torch.device,
        memory: HostMemory,
        *,
        pin_grads: bool,
        pin_weights: bool,
    ) -> None:
        self._parts = [part for segment in segments for part in parts(segment)]
        self._down, self._up = new_copies(device), new_copies(device)
        grads, weights = staging_sizes(segments)
        self._stages = [
            _Stage(memory.staging(grads, pin_grads), memory.staging(weights, pin_weights), [], [])
            for _ in range(_BUFFERS if self._down is not None and self._parts else 0)
        ]

    @property
    def staging_bytes(self) -> int:
        """Of the buffers that pieces pass through."""
        return sum(stage.grad.nbytes + stage.weights.nbytes for stage in self._stages)

    def begin(self) -> None:
        """Begins to bring the first gradients down, which are final; the update may follow or not."""
        if self._down is not None:
            self._down.follow()
            for part, stage in zip(self._parts, self._stages, strict=False):
                stage.load(part, self._down)

    def run(self, rule: Callable[[Segment], None]) -> None:
        """Updates everything by `rule`; afterwards the device goes on with the new weights. After `begin`."""
        if self._down is None or self._up is None:
            for part in self._parts:
                rule(part)
            return
        for number, part in enumerate(self._parts):
            stage = self._stages[number % _BUFFERS]
            stage.update(part, rule, self._up)
            if number + _BUFFERS < len(self._parts):
                stage.load(self._parts[number + _BUFFERS], self._down)
        self._up.lead()


def staging_sizes(segments: Iterable[Segment]) -> tuple[int, int]:
    """Bytes of a buffer for gradients, and of one for weights."""
    grads = weights = 0
    for segment in segments:
        elements = min(segment.grad.numel(), PIECE)
        grads = max(grads, elements * segment.grad.itemsize)
        weights = max(weights, elements * _passing_weights(segment).itemsize)
    return grads, weights
