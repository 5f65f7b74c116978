"""Watches the steps of this rank from a thread: which rank holds up the others, and which one is stuck."""

import linecache
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch.distributed as dist

_PROJECT = str(Path(__file__).parents[1])
_COLLECTIVES = str(Path(dist.__file__).parent)
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")

# Time between two looks at what the rank is doing, in seconds.
_INTERVAL = 0.05
# Time between two looks at whether another rank asks, and that the others have for their answers.
_ASK_INTERVAL, _PATIENCE = 1.0, 5.0


class StepMonitor:
    """Samples, during each step, whether this rank waits in a collective or works.

    A step that lasts longer than `limit` seconds makes one rank ask all others where they are; `report` gets one
    sentence about those that do not wait for others. Threads that wait for a GPU count as working.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, limit: float, report: Callable[[str], None]
    ) -> None:
        self._store, self._rank, self._world_size, self._limit = store, rank, world_size, limit
        self._report = report
        self._started: float | None = None
        self._step = 0
        self._looks = self._looks_at_work = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step monitor", daemon=True)
        self._thread.start()

    def begin(self, step: int) -> None:
        """Marks the start of a step."""
        self._looks = self._looks_at_work = 0
        self._step, self._started = step, time.monotonic()

    def end(self) -> None:
        """Marks the end of a step."""
        self._started = None

    def stop(self) -> None:
        """Ends the watch, before the interpreter does.

        A thread that comes back from the store into an interpreter that is ending would abort the process.
        """
        self._stopped.set()
        self._thread.join(_PATIENCE)

    def busy_seconds(self) -> float:
        """Time of the step so far in which this rank was not waiting for others."""
        if self._started is None or not self._looks:
            return 0.0
        return (time.monotonic() - self._started) * self._looks_at_work / self._looks

    def _run(self) -> None:
        asked_at = 0.0
        answered = -1
        try:
            while not self._stopped.wait(_INTERVAL):
                started, now = self._started, time.monotonic()
                if started is not None:
                    self._looks += 1
                    self._looks_at_work += _place_of_work() is not None
                if now - asked_at < _ASK_INTERVAL:
                    continue
                asked_at = now
                if answered == self._step:
                    continue
                if self._store.check([f"where/{self._step}/asked"]):
                    answered = self._step
                    self._answer()
                elif started is not None and now - started > self._limit and self._is_first_to_ask():
                    answered = self._step
                    self._ask()
        except RuntimeError:
            return  # the job is over, and with it the store

    def _is_first_to_ask(self) -> bool:
        return self._store.add(f"where/{self._step}/asked", 1) == 1

    def _answer(self) -> None:
        self._store.set(f"where/{self._step}/{self._rank}", _place_of_work() or "")

    def _ask(self) -> None:
        self._answer()
        keys = {rank: f"where/{self._step}/{rank}" for rank in range(self._world_size)}
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not self._store.check(list(keys.values())):
            if self._stopped.wait(_INTERVAL):
                return
        found = []
        for rank, key in keys.items():
            place = self._store.get(key).decode() if self._store.check([key]) else "not answering"
            if place:
                found.append(f"rank {rank} is {place}")
        self._report(
            f"step {self._step} has taken {self._limit:.0f} s; "
            + ("; ".join(found) + "; all others wait" if found else "every rank waits in a collective")
        )


def _place_of_work() -> str | None:
    """Where the program is, or None if one of its threads waits for other ranks."""
    main = threading.main_thread().ident
    place = "at an unknown place"
    for ident, innermost in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        frames = [frame for frame, _ in traceback.walk_stack(innermost)]
        if any(_waits_for_others(frame) for frame in frames):
            return None
        if ident == main:
            own = next((frame for frame in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)), innermost)
            place = f"at {own.f_code.co_filename}:{own.f_lineno} ({own.f_code.co_name})"
    return place


def _waits_for_others(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.startswith(_COLLECTIVES):
        return True
    # communication that was started earlier
    return file.startswith(_PROJECT) and ".wait()" in linecache.getline(file, frame.f_lineno)
