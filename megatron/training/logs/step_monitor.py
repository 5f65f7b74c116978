"""Watches the steps of this rank from a thread: which rank holds up the others, and which one is stuck."""

import contextlib
import json
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron.core import collectives, waiting
from megatron.core.waiting import waits

_COLLECTIVES = str(Path(dist.__file__).parent)
# Libraries, and what only marks that a thread waits: a place is that of what calls them.
_PASSED_OVER = (
    sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<", collectives.__file__, waiting.__file__,
)  # fmt: skip

# Time between two looks at what the rank is doing, in seconds.
_INTERVAL = 0.05
# Time between two looks at whether another rank asks, and that the others have for their answers.
_ASK_INTERVAL, _PATIENCE = 1.0, 5.0
# After a signal to stop: time until the first look for ranks that are gone, between two of them, and for the answers.
# A rank can be silent for a while without being gone, when a library holds the interpreter.
_SIGNAL_DELAY, _SIGNAL_INTERVAL, _SIGNAL_PATIENCE = 4.0, 20.0, 15.0


class Whereabouts(NamedTuple):
    """Where a rank is."""

    waits_for: str
    """As in `megatron.core.waiting`; empty while it works."""
    place: str


class StepMonitor:
    """Samples, during each step, whether this rank waits for others or works.

    A step that lasts longer than `limit` seconds makes one rank ask all others where they are; `report` gets one
    sentence about those that do not wait for others, or about all if every rank does. A thread that waits for its own
    device counts as working, since that may be what is slow.

    `stopping` says how many seconds ago a signal asked to stop. It may come from a launcher that has lost a rank, for
    which the others then wait for ever; so all are asked, and a sentence about those that are silent goes to `lost`,
    which ends the process. `look` is called each second.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        limit: float,
        report: Callable[[str], None],
        *,
        stopping: Callable[[], float | None] = lambda: None,
        lost: Callable[[str], None] = lambda sentence: None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._rank, self._world_size, self._limit = store, rank, world_size, limit
        self._report, self._stopping, self._lost, self._look = report, stopping, lost, look
        self._started: float | None = None
        self._step = 0
        self._asked_of = -1
        self._calls = 0
        self._called_at = 0.0
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
        """Ends the watch, before the interpreter does, and says that this rank is not lost but done.

        A thread that comes back from the store into an interpreter that is ending would abort the process.
        """
        self._stopped.set()
        self._thread.join(_PATIENCE)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"done/{self._rank}", "")

    def busy_seconds(self) -> float:
        """Time of the step so far in which this rank was not waiting for others."""
        if self._started is None or not self._looks:
            return 0.0
        return (time.monotonic() - self._started) * self._looks_at_work / self._looks

    def _run(self) -> None:
        looked_at = 0.0
        try:
            while not self._stopped.wait(_INTERVAL):
                started, now = self._started, time.monotonic()
                if started is not None:
                    self._looks += 1
                    self._looks_at_work += _whereabouts().waits_for != "other ranks"
                if now - looked_at < _ASK_INTERVAL:
                    continue
                looked_at = now
                self._look()
                since = self._stopping()
                if self._store.check([self._key("asked")]):
                    self._answer(now)
                elif since is not None and since > _SIGNAL_DELAY and now - self._called_at > _SIGNAL_INTERVAL:
                    self._look_for_lost_ranks(now)
                elif started is not None and now - started > self._limit and self._asked_of != self._step:
                    self._ask_about_step(now)
        except RuntimeError:
            return  # the job is over, and with it the store

    def _key(self, name: str) -> str:
        """Ranks may be in different steps, and all count the calls."""
        return f"where/{self._calls}/{name}"

    def _answer(self, now: float) -> None:
        self._store.set(self._key(str(self._rank)), json.dumps(_whereabouts()))
        self._calls += 1
        self._called_at, self._asked_of = now, self._step

    def _ask(self, now: float, patience: float) -> dict[int, Whereabouts | None] | None:
        """Where every rank is, None if it does not answer; None if another rank asks."""
        if self._store.add(self._key("asked"), 1) != 1:
            return None
        keys = {rank: self._key(str(rank)) for rank in range(self._world_size)}
        self._answer(now)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not self._store.check(list(keys.values())):
            if self._stopped.wait(_INTERVAL):
                return None
            self._look()
        return {
            rank: Whereabouts(*json.loads(self._store.get(key))) if self._store.check([key]) else None
            for rank, key in keys.items()
        }

    def _ask_about_step(self, now: float) -> None:
        step, places = self._step, self._ask(now, _PATIENCE)
        if places is None:
            return
        ranks: dict[Whereabouts, list[int]] = {}
        for rank, found in places.items():
            ranks.setdefault(found or Whereabouts("", "not answering"), []).append(rank)
        sentences = [_sentence(found, ranks[found]) for found in sorted(ranks) if found.waits_for != "other ranks"]
        if not sentences:
            sentences = ["every rank waits", *(_sentence(found, ranks[found]) for found in sorted(ranks))]
        elif len(sentences) < len(ranks):
            sentences.append("all others wait")
        self._report(f"step {step} has taken {self._limit:.0f} s; {'; '.join(sentences)}")

    def _look_for_lost_ranks(self, now: float) -> None:
        places = self._ask(now, _SIGNAL_PATIENCE)
        silent = [rank for rank, place in (places or {}).items() if place is None]
        silent = [rank for rank in silent if not self._store.check([f"done/{rank}"])]
        if silent:
            self._lost(
                f"rank {shown_ranks(silent)} does not answer and may have been killed (by the system if memory ran "
                "out, for example): nothing was saved since the last checkpoint"
            )


def _whereabouts() -> Whereabouts:
    """Of the first thread that waits, or else of the main thread."""
    marked, main = waits(), threading.main_thread().ident
    found = Whereabouts("", "at an unknown place")
    for ident, innermost in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        frames = [frame for frame, _ in traceback.walk_stack(innermost)]
        waits_for = marked.get(ident, "")
        # a script's own collectives carry no mark
        if not waits_for and any(frame.f_code.co_filename.startswith(_COLLECTIVES) for frame in frames):
            waits_for = "other ranks"
        if waits_for or ident == main:
            own = next((frame for frame in frames if not frame.f_code.co_filename.startswith(_PASSED_OVER)), innermost)
            found = Whereabouts(waits_for, f"at {own.f_code.co_filename}:{own.f_lineno} ({own.f_code.co_name})")
        if waits_for:
            break
    return found


def _sentence(found: Whereabouts, ranks: list[int]) -> str:
    several = len(ranks) > 1
    who = f"{'ranks' if several else 'rank'} {shown_ranks(ranks)}"
    if found.waits_for:
        return f"{who} {'wait' if several else 'waits'} for {found.waits_for} {found.place}"
    return f"{who} {'are' if several else 'is'} {found.place}"


def shown_ranks(ranks: list[int]) -> str:
    """The first few of `ranks`, as text."""
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
