"""Finds a machine that is gone without a word, as after a power failure: its connections stay open, and nothing closes
them, so that messages to it are waited for until a timeout of minutes or hours."""

import contextlib
import threading
from collections.abc import Callable

import torch.distributed as dist

from megatron.training.logs.step_monitor import shown_ranks

_INTERVAL = 10.0
"""Seconds between two beats."""
_ROUNDS = 9
"""Rounds without a sign of life after which a rank or the store is lost."""
_PATIENCE = 5.0
_DONE = "done"


class Heartbeat:
    """Tells through `store`, each `_INTERVAL`, that this rank is alive; `lost` gets a sentence if another is not.

    The first rank looks at all others. These watch whether the store, on the first rank's machine, still answers.
    Its own threads do both, so that a rank may save, compile or wait as long as it likes. Rounds are counted and not
    seconds: a job that was suspended as a whole, or one process that was not scheduled, goes on.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, lost: Callable[[str], None]) -> None:
        self._store, self._rank, self._lost = store, rank, lost
        self._keys = [f"beat/{rank}" for rank in range(world_size)]
        self._seen: list[bytes | None] = [None] * world_size
        self._silent = [0] * world_size
        self._answers = self._answers_seen = self._unanswered = 0
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins."""
        for action in (self.beat, self.watch):
            self._threads.append(threading.Thread(target=self._run, args=(action,), name="heartbeat", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Ends it, before the interpreter does, and says that this rank is not lost but done."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
        with contextlib.suppress(RuntimeError):
            self._store.set(self._keys[self._rank], _DONE)

    def beat(self) -> None:
        """One round of the thread that talks to the store. Raises RuntimeError if that is gone."""
        self._store.add(self._keys[self._rank], 1)
        if self._rank == 0:
            self._look()
        self._answers += 1

    def watch(self) -> None:
        """One round of the thread that counts how long the other one has been waiting."""
        self._unanswered = self._unanswered + 1 if self._answers == self._answers_seen else 0
        self._answers_seen = self._answers
        if self._unanswered >= _ROUNDS:
            self._lost(
                f"the store of the job, on the first machine, has not answered for {_ROUNDS * _INTERVAL:.0f} s: that "
                "machine may be down, or cut off from the network; nothing was saved since the last checkpoint"
            )

    def _look(self) -> None:
        beats: list[bytes | None]
        if self._store.check(self._keys):
            beats = list(self._store.multi_get(self._keys))
        else:
            beats = [self._store.get(key) if self._store.check([key]) else None for key in self._keys]
        for rank, beat in enumerate(beats):
            still = beat == self._seen[rank] and beat != _DONE.encode()
            self._silent[rank] = self._silent[rank] + 1 if still else 0
            self._seen[rank] = beat
        silent = [rank for rank, rounds in enumerate(self._silent) if rounds >= _ROUNDS]
        if silent:
            self._lost(
                f"rank {shown_ranks(silent)} has given no sign of life for {_ROUNDS * _INTERVAL:.0f} s: the machine "
                "may be down, or cut off from the network; nothing was saved since the last checkpoint"
            )

    def _run(self, action: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: `watch` will say so, unless the job is over
            while not self._stopped.wait(_INTERVAL):
                action()
