"""Schedules as written down: complete, in a valid order, free of deadlocks, as large and as long as formulas say."""

from collections.abc import Iterator

import pytest

from megatron.core.pipeline_parallel.schedules import (
    AwaitReceived,
    AwaitSent,
    Backward,
    Forward,
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
    for overlap in (True, False):
        for backward_time in (1, 2):
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
    assert program(Pipeline(2), 0, 2) == (
        f0, Send(f0), Receive(b0), f1, AwaitSent(f0), Send(f1), Receive(b1), AwaitReceived(b0), b0, AwaitSent(f1),
        AwaitReceived(b1), b1,
    )  # fmt: skip
    assert program(Pipeline(2), 1, 1) == (Receive(f0), AwaitReceived(f0), f0, b0, Send(b0), AwaitSent(b0))
    assert program(Pipeline(1), 0, 1) == (f0, b0)
    assert program(Pipeline(2), 0, 1, overlap=False) == (
        f0,
        Send(f0),
        Receive(b0),
        AwaitReceived(b0),
        b0,
        AwaitSent(f0),
    )


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
