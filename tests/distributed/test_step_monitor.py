"""A rank that is stuck is named by those that wait for it; waiting does not count as work."""

import socket
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from distributed_testing import run_distributed

from megatron.core import collectives
from megatron.training.logs import step_monitor
from megatron.training.logs.step_monitor import StepMonitor


def _stuck_here(released: dist.Store) -> None:
    while not released.check(["reported"]):
        time.sleep(0.01)


def _step(rank: int, world_size: int, port: int) -> tuple[list[str], float]:
    """All wait for rank 1, each in its way; what a rank reports, and the share of the step in which it did not wait."""
    store = dist.TCPStore("localhost", port, world_size, rank == 0, timedelta(seconds=60))
    reported: list[str] = []
    done = threading.Event()

    def report(text: str) -> None:
        reported.append(text)
        done.set()
        released.set("reported", "")

    released = store.clone()
    monitor = StepMonitor(store.clone(), rank, world_size, 1.0, report)
    monitor.begin(7)
    start = time.monotonic()
    if rank == 1:
        _stuck_here(released)
    if rank == 2:  # for what another call has begun
        collectives.wait(dist.all_reduce(torch.zeros(1), async_op=True))
    elif rank == 3:  # in a call of a script that knows nothing of marks
        dist.all_reduce(torch.zeros(1))
    else:
        collectives.all_reduce(torch.zeros(1))
    busy = monitor.busy_seconds() / (time.monotonic() - start)
    monitor.end()
    dist.barrier()
    monitor.stop()
    assert "step monitor" not in {thread.name for thread in threading.enumerate()}
    return reported, busy


def test_a_stuck_rank_is_named_with_its_place() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    outcomes = run_distributed(_step, 4, port)
    (text,) = [text for reported, _ in outcomes for text in reported]
    assert text.startswith("step 7 has taken 1 s; rank 1 is at ") and text.endswith("; all others wait")
    assert "test_step_monitor.py" in text and "(_stuck_here)" in text
    assert outcomes[1][1] > 0.6 and max(outcomes[rank][1] for rank in (0, 2, 3)) < 0.4


def _lost(rank: int, world_size: int, port: int) -> list[str]:
    """A signal came to all; rank 1 answers no more, and rank 2 is done."""
    store = dist.TCPStore("localhost", port, world_size, rank == 0, timedelta(seconds=60))
    step_monitor._SIGNAL_PATIENCE = 2.0
    told: list[str] = []
    over = threading.Event()

    def lost(text: str) -> None:
        told.append(text)
        over.set()

    if rank != 1:
        monitor = StepMonitor(store.clone(), rank, world_size, 1e9, print, stopping=lambda: 100.0, lost=lost)
        if rank == 2:
            monitor.stop()
        else:
            assert over.wait(60)
            monitor.stop()
    dist.barrier()
    return told


def test_after_a_signal_a_silent_rank_is_lost_and_one_that_is_done_is_not() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    (text,) = run_distributed(_lost, 3, port)[0]
    assert text.startswith("rank 1 does not answer")
