"""Programs of all ranks played through without a model: do they fit together, and how long do they take?"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedules import (
    AwaitReceived,
    AwaitSent,
    Backward,
    Forward,
    Instruction,
    Pass,
    Pipeline,
    Receive,
    Send,
)


@dataclass(frozen=True)
class TimedPass:
    """A pass, and when it ran."""

    work: Pass
    start: float
    end: float


@dataclass
class _Channel:
    """Messages of one kind between two ranks: the k-th that is sent is the k-th that is received."""

    sent: list[tuple[Pass, float]]
    received: list[tuple[Pass, float]]


class _Simulation:
    def __init__(
        self, pipeline: Pipeline, forward_time: float, backward_time: float, device_waits: Callable[[int, Pass], bool]
    ) -> None:
        self.pipeline, self.device_waits = pipeline, device_waits
        self.time = {Forward: forward_time, Backward: backward_time}
        self.channels: dict[tuple[int, type[Pass]], _Channel] = defaultdict(lambda: _Channel([], []))
        self.clocks = [0.0] * pipeline.ranks
        self.done: list[list[TimedPass]] = [[] for _ in range(pipeline.ranks)]

    def _between(self, rank: int, kind: type[Pass]) -> tuple[_Channel, _Channel]:
        """Where a rank sends and receives messages of a kind: channels are numbered by the rank that sends."""
        before = rank - 1 if kind is Forward else rank + 1
        return self.channels[rank, kind], self.channels[before % self.pipeline.ranks, kind]

    def _all_over(self, rank: int) -> float | None:
        """When all messages that a rank has begun are over; None if one waits for another rank."""
        over = self.clocks[rank]
        for kind in (Forward, Backward):
            outgoing, incoming = self._between(rank, kind)
            for ours, theirs in ((outgoing.sent, outgoing.received), (incoming.received, incoming.sent)):
                if len(theirs) < len(ours):
                    return None
                over = max([over, *(begun for _, begun in theirs[len(ours) - 1 : len(ours)])])
        return over

    def advance(self, rank: int, instruction: Instruction) -> bool:
        """Carries out one instruction; False if it has to wait for another rank."""
        clock = self.clocks[rank]
        if isinstance(instruction, Forward | Backward):
            if self.device_waits(rank, instruction):
                over = self._all_over(rank)
                if over is None:
                    return False
                clock = over
            self.clocks[rank] = clock + self.time[type(instruction)]
            self.done[rank].append(TimedPass(instruction, clock, self.clocks[rank]))
            return True
        work = instruction.of
        outgoing, incoming = self._between(rank, type(work))
        if isinstance(instruction, Send):
            outgoing.sent.append((work, clock))
        elif isinstance(instruction, Receive):
            incoming.received.append((work, clock))
        else:
            is_sent = isinstance(instruction, AwaitSent)
            ours, theirs = (outgoing.sent, outgoing.received) if is_sent else (incoming.received, incoming.sent)
            number = [posted for posted, _ in ours].index(work)
            if len(theirs) <= number:
                return False
            if isinstance(instruction, AwaitReceived):
                source = self.pipeline.source(rank, work)
                assert source is not None and theirs[number][0] == source[1], (rank, work, theirs[number])
            self.clocks[rank] = max(clock, theirs[number][1])
        return True


def simulate(
    pipeline: Pipeline,
    programs: Sequence[Sequence[Instruction]],
    forward_time: float = 1.0,
    backward_time: float = 1.0,
    device_waits: Callable[[int, Pass], bool] = lambda rank, work: False,
) -> list[list[TimedPass]]:
    """Runs the programs of all ranks and returns when each rank did what.

    A message takes no time, but both sides have to be ready: neither a send nor a receive is over before the other
    side has begun its own, and the messages of one kind between two ranks keep their order, as with NCCL. The times
    are those of a pass through one chunk. `device_waits(rank, pass)` says which passes make the host wait until the
    device has done all that it was given, as loading a kernel or returning memory to CUDA may: then every message that
    the rank has begun must be over before. Raises ValueError if the ranks deadlock.
    """
    simulation = _Simulation(pipeline, forward_time, backward_time, device_waits)
    position = [0] * pipeline.ranks
    while any(position[rank] < len(programs[rank]) for rank in range(pipeline.ranks)):
        before = list(position)
        for rank, instructions in enumerate(programs):
            while position[rank] < len(instructions) and simulation.advance(rank, instructions[position[rank]]):
                position[rank] += 1
        if position == before:
            waiting = [f"rank {r}: {programs[r][n]}" for r, n in enumerate(position) if n < len(programs[r])]
            raise ValueError(f"the ranks wait for each other: {'; '.join(waiting)}")
    return simulation.done
