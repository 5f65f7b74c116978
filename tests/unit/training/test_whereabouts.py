"""Where a rank is, and the sentence about all ranks."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron.core import collectives
from megatron.core.waiting import waiting, waits
from megatron.training.logs.step_monitor import StepMonitor, Whereabouts, _whereabouts


class _Held:
    """Work that is not done before it is released."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.begun.set()
        assert self.released.wait(60)


@contextmanager
def _held(*marks: str) -> Iterator[None]:
    """Another thread waits, as long as the block lasts, marked in turn by all of `marks`."""
    work = _Held()

    def hold() -> None:
        with ExitStack() as stack:
            for mark in marks:
                stack.enter_context(waiting(mark))  # type: ignore[arg-type]
            work.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert work.begun.wait(60)
    try:
        yield
    finally:
        work.released.set()
        thread.join()


def _seen() -> Whereabouts:
    """What a monitor's thread finds."""
    found: list[Whereabouts] = []
    thread = threading.Thread(target=lambda: found.append(_whereabouts()))
    thread.start()
    thread.join()
    return found[0]


def test_a_rank_is_where_its_main_thread_is_unless_one_waits() -> None:
    with _held():
        assert _seen().waits_for == "" and "test_whereabouts.py" in _seen().place and "(_seen)" in _seen().place
    with _held("the device"):
        assert _seen().waits_for == "the device" and "(wait)" in _seen().place
    with _held("the device", "other ranks"):
        assert _seen().waits_for == "other ranks"
    assert _seen().waits_for == ""


def test_the_place_of_a_wait_in_c_is_who_called_for_it() -> None:
    lock = threading.Lock()
    lock.acquire()

    def caller() -> None:
        collectives.wait(SimpleNamespace(wait=lock.acquire))  # type: ignore[arg-type]

    thread = threading.Thread(target=caller)
    thread.start()
    deadline = time.monotonic() + 60
    while thread.ident not in waits() and time.monotonic() < deadline:
        pass
    try:
        assert _seen().waits_for == "other ranks" and "(caller)" in _seen().place
    finally:
        lock.release()
        thread.join()


WORKS = Whereabouts("", "at a.py:1 (f)")
DEVICE = Whereabouts("the device", "at b.py:2 (g)")
OTHERS = Whereabouts("other ranks", "at c.py:3 (h)")
ELSEWHERE = Whereabouts("other ranks", "at d.py:4 (i)")


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ([OTHERS, WORKS, OTHERS], "rank 1 is at a.py:1 (f); all others wait"),
        ([WORKS, WORKS], "ranks 0, 1 are at a.py:1 (f)"),
        ([OTHERS, None, WORKS], "rank 2 is at a.py:1 (f); rank 1 is not answering; all others wait"),
        ([DEVICE, WORKS, DEVICE], "rank 1 is at a.py:1 (f); ranks 0, 2 wait for the device at b.py:2 (g)"),
        ([OTHERS, DEVICE], "rank 1 waits for the device at b.py:2 (g); all others wait"),
        (
            [OTHERS, ELSEWHERE, OTHERS],
            "every rank waits; ranks 0, 2 wait for other ranks at c.py:3 (h); "
            "rank 1 waits for other ranks at d.py:4 (i)",
        ),
        (
            [WORKS, *[DEVICE] * 4095],
            "rank 0 is at a.py:1 (f); ranks 1, 2, 3, 4, 5, 6, 7, 8, ... wait for the device at b.py:2 (g)",
        ),
    ],
)
def test_the_sentence_names_who_keeps_the_others_waiting(places: list[Whereabouts | None], told: str) -> None:
    reported: list[str] = []
    monitor: Any = StepMonitor(dist.HashStore(), 0, len(places), 48.0, reported.append)
    monitor.stop()
    monitor._ask = lambda now, patience: dict(enumerate(places))
    monitor._ask_about_step(0.0)
    assert reported == [f"step 0 has taken 48 s; {told}"]


@pytest.mark.parametrize(("mark", "works"), [("the device", True), ("other ranks", False)])
def test_waiting_for_the_device_counts_as_work(mark: Any, works: bool) -> None:
    monitor = StepMonitor(dist.HashStore(), 0, 1, 48.0, print)
    with waiting(mark):
        monitor.begin(1)
        while monitor._looks < 2:
            pass
        monitor.stop()
    assert (monitor.busy_seconds() > 0) == works
