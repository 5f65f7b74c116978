"""Programs of all ranks played through without a model: do they fit together, and how long do they take?"""

from collections import defaultdict
from collections.abc import Sequence
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
    def __init__(self, pipeline: Pipeline, forward_time: float, backward_time: float) -> None:
        self.pipeline = pipeline
        self.time = {Forward: forward_time, Backward: backward_time}
        self.channels: dict[tuple[int, type[Pass]], _Channel] = defaultdict(lambda: _Channel([], []))
        self.clocks = [0.0] * pipeline.ranks
        self.done: list[list[TimedPass]] = [[] for _ in range(pipeline.ranks)]

    def _incoming(self, rank: int, work: Pass) -> _Channel:
        """What passes of this kind receive from: channels are numbered by the rank that sends."""
        sender = rank - 1 if isinstance(work, Forward) else rank + 1
        return self.channels[sender % self.pipeline.ranks, type(work)]

    def _sender_of(self, rank: int, work: Pass) -> Pass:
        """The pass whose result is the input of this one."""
        step = -1 if isinstance(work, Forward) else 1
        chunk = (self.pipeline.stage(rank, work.chunk) + step) // self.pipeline.ranks
        return type(work)(work.microbatch, chunk)

    def advance(self, rank: int, instruction: Instruction) -> bool:
        """Carries out one instruction; False if it has to wait for another rank."""
        clock = self.clocks[rank]
        if isinstance(instruction, Forward | Backward):
            self.clocks[rank] = clock + self.time[type(instruction)]
            self.done[rank].append(TimedPass(instruction, clock, self.clocks[rank]))
            return True
        work = instruction.of
        if isinstance(instruction, Send):
            self.channels[rank, type(work)].sent.append((work, clock))
        elif isinstance(instruction, Receive):
            self._incoming(rank, work).received.append((work, clock))
        else:
            outgoing = isinstance(instruction, AwaitSent)
            channel = self.channels[rank, type(work)] if outgoing else self._incoming(rank, work)
            ours, theirs = (channel.sent, channel.received) if outgoing else (channel.received, channel.sent)
            number = [posted for posted, _ in ours].index(work)
            if len(theirs) <= number:
                return False
            if isinstance(instruction, AwaitReceived):
                assert theirs[number][0] == self._sender_of(rank, work), (rank, work, theirs[number])
            self.clocks[rank] = max(clock, theirs[number][1])
        return True


def simulate(
    pipeline: Pipeline, programs: Sequence[Sequence[Instruction]], forward_time: float = 1.0, backward_time: float = 1.0
) -> list[list[TimedPass]]:
    """Runs the programs of all ranks and returns when each rank did what.

    A message takes no time, but both sides have to be ready: neither a send nor a receive is over before the other
    side has begun its own, and the messages of one kind between two ranks keep their order, as with NCCL. The times
    are those of a pass through one chunk. Raises ValueError if the ranks wait for each other for ever.
    """
    simulation = _Simulation(pipeline, forward_time, backward_time)
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
