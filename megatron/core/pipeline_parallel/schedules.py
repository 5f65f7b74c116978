"""The order of a step's forward and backward passes, written down before anything runs.

p pipeline ranks hold v chunks of layers each (v is 1 except in an interleaved pipeline) and work on m microbatches.
Stage c p + r, counted along the model, is chunk c of rank r. A program is all that one rank does in a step; it is plain
data, so that it can be checked, timed and drawn (see `simulation`) without running a model.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class _OneChunk:
    microbatch: int
    chunk: int


class Forward(_OneChunk):
    """A microbatch through one chunk of the rank."""


class Backward(_OneChunk):
    """The gradients of a microbatch through one chunk of the rank."""


Pass = Forward | Backward


@dataclass(frozen=True)
class _Message:
    of: Pass


class Receive(_Message):
    """Begin to receive the input of a pass."""


class AwaitReceived(_Message):
    """Wait until the input of a pass is there."""


class Send(_Message):
    """Begin to send the result of a pass."""


class AwaitSent(_Message):
    """Wait until the result of a pass is sent, and give it up."""


Instruction = Pass | Receive | AwaitReceived | Send | AwaitSent


@dataclass(frozen=True)
class Pipeline:
    """The shape of a pipeline."""

    ranks: int
    """p, pipeline-parallel size."""
    chunks: int = 1
    """v, chunks of layers on each rank."""

    def stage(self, rank: int, chunk: int) -> int:
        """Number of a chunk along the whole model."""
        return chunk * self.ranks + rank

    def receives(self, rank: int, work: Pass) -> bool:
        """Whether the input of a pass comes from another rank."""
        stage = self.stage(rank, work.chunk)
        return stage > 0 if isinstance(work, Forward) else stage < self.ranks * self.chunks - 1

    def sends(self, rank: int, work: Pass) -> bool:
        """Whether the result of a pass goes to another rank."""
        stage = self.stage(rank, work.chunk)
        return stage < self.ranks * self.chunks - 1 if isinstance(work, Forward) else stage > 0

    def source(self, rank: int, work: Pass) -> "tuple[int, Pass] | None":
        """The rank and the pass whose result is the input of a pass, if that comes from another rank."""
        if not self.receives(rank, work):
            return None
        chunk, sender = divmod(self.stage(rank, work.chunk) + (-1 if isinstance(work, Forward) else 1), self.ranks)
        return sender, type(work)(work.microbatch, chunk)

    def check_microbatches(self, microbatches: int) -> None:
        """Raises ValueError if a step of so many microbatches cannot be scheduled."""
        if self.chunks > 1 and microbatches % self.ranks:
            raise ValueError(
                f"the interleaved pipeline schedule needs a multiple of --pipeline-model-parallel-size ({self.ranks}) "
                f"microbatches in a step, got {microbatches}: make --global-batch-size (and the sizes of "
                f"--rampup-batch-size) multiples of --micro-batch-size x data-parallel size x {self.ranks}, or do "
                "without virtual pipeline stages"
            )

    def warmup_passes(self, rank: int, microbatches: int) -> int:
        """Forward passes of a rank before its first backward pass."""
        if self.chunks == 1:
            return min(self.ranks - rank - 1, microbatches)
        return min(2 * (self.ranks - rank - 1) + (self.chunks - 1) * self.ranks, microbatches * self.chunks)

    def peak_live(self, rank: int, microbatches: int) -> int:
        """Largest number of chunks whose activations a rank keeps at once: min(p - r, m) without interleaving."""
        return min(self.warmup_passes(rank, microbatches) + 1, microbatches * self.chunks)

    def bubble_share(self, microbatches: int) -> float:
        """Idle time of a rank as a share of its computing time, (p - 1) / (v m), with equal stages and free messages.

        arXiv:2104.04473, sections 2.2.1 and 2.2.2.
        """
        return (self.ranks - 1) / (self.chunks * microbatches)


def passes(pipeline: Pipeline, rank: int, microbatches: int, forward_only: bool = False) -> list[Pass]:
    """The passes of one rank in their order.

    Without interleaving it is 1F1B (PipeDream-Flush): after p - r - 1 forward passes, forward and backward passes take
    turns; with one rank, that is plain accumulation. Interleaved, p microbatches go through chunk 0, then the same ones
    through chunk 1, and so on (arXiv:2104.04473, section 2.2.2). Raises ValueError if the microbatches do not fit.
    """
    pipeline.check_microbatches(microbatches)
    group = pipeline.ranks * pipeline.chunks if pipeline.chunks > 1 else 1
    numbers = range(microbatches * pipeline.chunks)

    def place(number: int) -> tuple[int, int]:
        groups_before, position = divmod(number, group)
        chunk, microbatch = divmod(position, group // pipeline.chunks)
        return groups_before * (group // pipeline.chunks) + microbatch, chunk

    forward: list[Pass] = [Forward(*place(number)) for number in numbers]
    if forward_only:
        return forward
    backward: list[Pass] = [
        Backward(microbatch, pipeline.chunks - 1 - chunk) for microbatch, chunk in map(place, numbers)
    ]
    warmup = pipeline.warmup_passes(rank, microbatches)
    steady = [work for pair in zip(forward[warmup:], backward, strict=False) for work in pair]
    return [*forward[:warmup], *steady, *backward[len(numbers) - warmup :]]


@functools.cache
def _timetable(pipeline: Pipeline, microbatches: int, forward_only: bool) -> dict[tuple[int, Pass], int]:
    """(rank, pass) -> when it starts, if every pass takes one unit of time and messages take none."""
    orders = [passes(pipeline, rank, microbatches, forward_only) for rank in range(pipeline.ranks)]
    starts: dict[tuple[int, Pass], int] = {}
    position, clock = [0] * pipeline.ranks, [0] * pipeline.ranks
    while len(starts) < sum(map(len, orders)):
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                work = order[position[rank]]
                needed = pipeline.source(rank, work)
                if needed is not None and needed not in starts:
                    break
                ready = 0 if needed is None else starts[needed] + 1
                starts[rank, work] = max(clock[rank], ready)
                position[rank], clock[rank] = position[rank] + 1, starts[rank, work] + 1
    return starts


def _receives(pipeline: Pipeline, rank: int, microbatches: int, forward_only: bool) -> list[list[Pass]]:
    """For each pass of a rank in its order, the passes whose inputs it begins to receive right before it."""
    works = passes(pipeline, rank, microbatches, forward_only)
    if pipeline.chunks == 1:
        return [[work] if pipeline.receives(rank, work) else [] for work in works]
    starts = _timetable(pipeline, microbatches, forward_only)
    sent = {work: starts[source] + 1 for work in works if (source := pipeline.source(rank, work)) is not None}
    coming = sorted(sent, key=sent.__getitem__)
    begun: list[list[Pass]] = []
    for work in works:
        ready = [other for other in coming if sent[other] <= starts[rank, work]]
        begun.append(ready)
        coming = coming[len(ready) :]
    return begun


@functools.cache
def program(
    pipeline: Pipeline, rank: int, microbatches: int, *, forward_only: bool = False, overlap: bool = True
) -> tuple[Instruction, ...]:
    """Everything one rank does in a step, passes and messages.

    A rank begins to receive the input of a pass right before it. In an interleaved pipeline messages go around the ring
    of ranks, and their receivers are busy when they are sent: there both sides begin a message at the same place of a
    timetable, and it travels while the ranks compute; without `overlap` it is over before the next pass.

    Whatever a rank has begun can therefore end before its next pass: a pass may make the host wait for all that the
    device has been given (`simulation`). Raises ValueError if the microbatches do not fit.
    """
    works = passes(pipeline, rank, microbatches, forward_only)
    begun = _receives(pipeline, rank, microbatches, forward_only)
    at_once = pipeline.chunks > 1 and not overlap
    lag = 2 if pipeline.chunks == 1 else 1 if overlap else 0
    instructions: list[Instruction] = []
    sending: list[tuple[int, Pass]] = []
    for number, (work, receiving) in enumerate(zip(works, begun, strict=True)):
        instructions += [Receive(other) for other in receiving]
        while at_once and sending:
            instructions.append(AwaitSent(sending.pop(0)[1]))
        if at_once:
            instructions += [AwaitReceived(other) for other in receiving]
        elif pipeline.receives(rank, work):
            instructions.append(AwaitReceived(work))
        instructions.append(work)
        while sending and sending[0][0] <= number - lag:
            instructions.append(AwaitSent(sending.pop(0)[1]))
        if pipeline.sends(rank, work):
            instructions.append(Send(work))
            sending.append((number, work))
    return (*instructions, *(AwaitSent(work) for _, work in sending))
