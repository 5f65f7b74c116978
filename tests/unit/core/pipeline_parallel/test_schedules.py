"""Schedules as written down: complete, in a valid order, free of deadlocks, as large and as long as formulas say."""

from collections.abc import Iterator, Sequence

import pytest

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
    passes,
    program,
)
from megatron.core.pipeline_parallel.simulation import TimedPass, simulate


def _shapes() -> Iterator[tuple[Pipeline, int]]:
    for ranks in (1, 2, 3, 4, 8):
        for microbatches in (1, 2, 3, 5, 8, 13):
            yield Pipeline(ranks), microbatches
    for ranks in (2, 3, 4, 6):
        for chunks in (2, 3, 5):
            for rounds in (1, 2, 3):
                yield Pipeline(ranks, chunks), rounds * ranks


SHAPES = [pytest.param(*shape, id=f"p{shape[0].ranks}v{shape[0].chunks}m{shape[1]}") for shape in _shapes()]


LARGE = [pytest.param(Pipeline(p, v), m, id=f"p{p}v{v}m{m}") for p, v, m in ((8, 1, 64), (8, 2, 32), (8, 4, 32))]


def _run(
    pipeline: Pipeline, microbatches: int, *, forward_only: bool = False, overlap: bool = True, backward_time: float = 2
) -> list[list[TimedPass]]:
    programs = [
        program(pipeline, rank, microbatches, forward_only=forward_only, overlap=overlap)
        for rank in range(pipeline.ranks)
    ]
    return simulate(pipeline, programs, 1, backward_time)


@pytest.mark.parametrize(("pipeline", "microbatches"), SHAPES)
@pytest.mark.parametrize("overlap", [True, False])
def test_every_pass_once_after_those_it_needs(pipeline: Pipeline, microbatches: int, overlap: bool) -> None:
    """The order along the stages of the model comes out of the messages, which the simulation carries."""
    for forward_only in (False, True):
        timed = _run(pipeline, microbatches, forward_only=forward_only, overlap=overlap)
        ends: dict[tuple[int, Pass], float] = {}
        for rank, own in enumerate(timed):
            kinds = (Forward,) if forward_only else (Forward, Backward)
            expected = {kind(m, c) for kind in kinds for m in range(microbatches) for c in range(pipeline.chunks)}
            assert len(own) == len(expected) and {entry.work for entry in own} == expected
            ends |= {(rank, entry.work): entry.end for entry in own}
        last = pipeline.ranks * pipeline.chunks - 1
        for rank, own in enumerate(timed):
            for entry in own:
                stage = pipeline.stage(rank, entry.work.chunk)
                forward = isinstance(entry.work, Forward)
                needed = [stage - 1] if forward else [stage + 1]
                for other in needed:
                    if 0 <= other <= last:
                        chunk, there = divmod(other, pipeline.ranks)
                        assert ends[there, type(entry.work)(entry.work.microbatch, chunk)] <= entry.start
                if not forward:
                    assert ends[rank, Forward(entry.work.microbatch, entry.work.chunk)] <= entry.start


@pytest.mark.parametrize(("pipeline", "microbatches"), SHAPES)
def test_live_microbatches_and_bubble_equal_the_formulas(pipeline: Pipeline, microbatches: int) -> None:
    p, v = pipeline.ranks, pipeline.chunks
    for rank in range(p):
        live = peak = 0
        for work in passes(pipeline, rank, microbatches):
            live += 1 if isinstance(work, Forward) else -1
            peak = max(peak, live)
        ahead = p - rank if v == 1 else 2 * (p - rank - 1) + (v - 1) * p + 1
        assert peak == pipeline.peak_live(rank, microbatches) == min(ahead, microbatches * v)
    # interleaved ranks that finish every message before they compute on wait for each other's backward passes
    times = [(True, 1), (True, 2), (True, 3), (False, 1), *([(False, 2)] if v == 1 else [])]
    for overlap, backward_time in times:
        timed = _run(pipeline, microbatches, overlap=overlap, backward_time=backward_time)
        span = max(own[-1].end for own in timed)
        busy = microbatches * v * (1 + backward_time)
        assert (span - busy) / busy == pytest.approx((p - 1) / (v * microbatches))
    assert pipeline.bubble_share(microbatches) == pytest.approx((p - 1) / (v * microbatches))


def _letters(pipeline: Pipeline, rank: int, microbatches: int) -> str:
    return " ".join(
        f"{'F' if isinstance(work, Forward) else 'B'}{work.microbatch}{'abc'[work.chunk]}"
        for work in passes(pipeline, rank, microbatches)
    )


def test_orders_written_out() -> None:
    assert _letters(Pipeline(1), 0, 2) == "F0a B0a F1a B1a"
    assert _letters(Pipeline(2), 0, 3) == "F0a F1a B0a F2a B1a B2a"
    assert _letters(Pipeline(2), 1, 3) == "F0a B0a F1a B1a F2a B2a"
    # figure 4 of arXiv:2104.04473 with two ranks
    assert _letters(Pipeline(2, 2), 1, 4) == ("F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a")
    assert _letters(Pipeline(2, 2), 0, 2) == "F0a F1a F0b F1b B0b B1b B0a B1a"


def test_what_is_sent_and_received_and_when() -> None:
    f0, f1, b0, b1 = Forward(0, 0), Forward(1, 0), Backward(0, 0), Backward(1, 0)
    expected = (
        f0, Send(f0), f1, Send(f1), Receive(b0), AwaitReceived(b0), b0, AwaitSent(f0), Receive(b1), AwaitReceived(b1),
        b1, AwaitSent(f1),
    )  # fmt: skip
    assert program(Pipeline(2), 0, 2) == program(Pipeline(2), 0, 2, overlap=False) == expected
    assert program(Pipeline(2), 1, 1) == (Receive(f0), AwaitReceived(f0), f0, b0, Send(b0), AwaitSent(b0))
    assert program(Pipeline(1), 0, 1) == (f0, b0)


def _under_way(instructions: Sequence[Instruction], begins: type[Receive | Send]) -> int:
    """Most messages of a direction that are begun and not awaited while a pass runs."""
    awaits = AwaitReceived if begins is Receive else AwaitSent
    now = most = 0
    for instruction in instructions:
        now += isinstance(instruction, begins) - isinstance(instruction, awaits)
        if isinstance(instruction, Forward | Backward):
            most = max(most, now)
    return most


@pytest.mark.parametrize(("pipeline", "microbatches"), SHAPES)
def test_messages_under_way_while_a_rank_computes(pipeline: Pipeline, microbatches: int) -> None:
    for overlap in (True, False):
        programs = [program(pipeline, rank, microbatches, overlap=overlap) for rank in range(pipeline.ranks)]
        received = max(_under_way(instructions, Receive) for instructions in programs)
        sent = max(_under_way(instructions, Send) for instructions in programs)
        if pipeline.chunks == 1:
            assert received == 0 and sent <= 2
        elif overlap:
            assert received <= 3 and sent <= 1
            assert received > 0 or microbatches == pipeline.ranks
        else:
            assert received == sent == 0


def _all_passes_wait(rank: int, work: Pass) -> bool:
    return True


@pytest.mark.parametrize(("pipeline", "microbatches"), [*SHAPES, *LARGE])
@pytest.mark.parametrize("forward_only", [False, True])
def test_any_pass_may_wait_for_the_device(pipeline: Pipeline, microbatches: int, forward_only: bool) -> None:
    """If all passes may, any of them may: a wait only adds to what has to happen before."""
    for overlap in (True, False):
        programs = [
            program(pipeline, rank, microbatches, forward_only=forward_only, overlap=overlap)
            for rank in range(pipeline.ranks)
        ]
        simulate(pipeline, programs, device_waits=_all_passes_wait)


def _connecting(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same program where the first send and the first receive of each channel wait for the other side."""
    waiting: list[Instruction] = []
    connected: set[tuple[type, type]] = set()
    for instruction in instructions:
        if instruction in waiting:  # awaited already
            continue
        waiting.append(instruction)
        if isinstance(instruction, Send | Receive) and (type(instruction), type(instruction.of)) not in connected:
            connected.add((type(instruction), type(instruction.of)))
            awaits = AwaitSent if isinstance(instruction, Send) else AwaitReceived
            waiting.append(awaits(instruction.of))
    return waiting


@pytest.mark.parametrize(("pipeline", "microbatches"), SHAPES)
@pytest.mark.parametrize("forward_only", [False, True])
def test_the_first_message_of_a_channel_may_wait_for_the_other_side(
    pipeline: Pipeline, microbatches: int, forward_only: bool
) -> None:
    """NCCL connects two ranks at their first message, which both must have begun before either goes on."""
    for overlap in (True, False):
        programs = [
            _connecting(program(pipeline, rank, microbatches, forward_only=forward_only, overlap=overlap))
            for rank in range(pipeline.ranks)
        ]
        simulate(pipeline, programs, device_waits=_all_passes_wait)


def _begun_one_pass_earlier(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same program with every receive before the pass that precedes it."""
    moved: list[Instruction] = []
    for instruction in instructions:
        place = max((n for n, other in enumerate(moved) if isinstance(other, Forward | Backward)), default=len(moved))
        moved.insert(place if isinstance(instruction, Receive) else len(moved), instruction)
    return moved


@pytest.mark.parametrize("pipeline", [Pipeline(2), Pipeline(4), Pipeline(8), Pipeline(2, 2), Pipeline(4, 4)])
def test_a_receive_before_a_pass_that_waits_is_found(pipeline: Pipeline) -> None:
    programs = [_begun_one_pass_earlier(program(pipeline, rank, 8)) for rank in range(pipeline.ranks)]
    simulate(pipeline, programs)  # as long as nothing waits for the device, that is well
    with pytest.raises(ValueError, match="the ranks wait for each other"):
        simulate(pipeline, programs, device_waits=_all_passes_wait)


def test_the_first_passes_of_a_step_that_hung() -> None:
    """Two ranks; their first passes load kernels, and rank 0's second one too: its early receive is for after that."""
    pipeline = Pipeline(2)
    programs = [_begun_one_pass_earlier(program(pipeline, rank, 8)) for rank in range(2)]
    first = {(rank, work) for rank in range(2) for work in (Forward(0, 0), Backward(0, 0))}
    simulate(pipeline, programs, device_waits=lambda rank, work: (rank, work) in first)
    second = first | {(0, Forward(1, 0))}
    with pytest.raises(ValueError, match="the ranks wait for each other"):
        simulate(pipeline, programs, device_waits=lambda rank, work: (rank, work) in second)


def test_a_wait_for_the_device_takes_its_time() -> None:
    """Rank 0 cannot begin its second pass before rank 1 has begun to receive the result of the first."""
    f0, f1 = Forward(0, 0), Forward(1, 0)
    programs: list[list[Instruction]] = [
        [f0, Send(f0), f1, AwaitSent(f0)],
        [h := Forward(5, 0), Receive(f0), AwaitReceived(f0), f0],
    ]
    pipeline = Pipeline(2)
    assert [timed.start for timed in simulate(pipeline, programs, 3)[0]] == [0, 3]
    programs[1].insert(0, Forward(6, 0))
    assert [timed.start for timed in simulate(pipeline, programs, 3, device_waits=lambda *_: True)[0]] == [0, 6]
    assert h in programs[1]


def test_a_deadlock_is_found() -> None:
    """Two ranks that each wait for the other's result before they begin to receive it."""
    pipeline = Pipeline(2, 2)
    programs = [
        [f := Forward(0, 0), Send(f), AwaitSent(f), Receive(g := Forward(0, 1)), AwaitReceived(g), g],
        [Send(h := Forward(5, 0)), AwaitSent(h), Receive(f), AwaitReceived(f), f],
    ]
    with pytest.raises(ValueError, match=r"wait for each other: rank 0: AwaitSent.*rank 1: AwaitSent"):
        simulate(pipeline, programs)


def test_interleaving_needs_whole_rounds() -> None:
    with pytest.raises(ValueError, match=r"multiple of --pipeline-model-parallel-size \(4\).*got 6.*global-batch-size"):
        passes(Pipeline(4, 2), 0, 6)
    assert len(passes(Pipeline(4, 1), 0, 6)) == 12
