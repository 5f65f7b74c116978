"""The end of a rank, which the other ranks must learn of: they may hang in a collective that it will never join."""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import torch.distributed as dist

_KEY = "ended"
# How long telling the others may take, in seconds: the store may be gone.
_TELLING = 3.0


class Ending:
    """Ends this rank at once, without tearing down groups, which would wait for ranks that hang.

    Once `join` gave it a store, the first rank that ends before the job is done leaves word in it. Every other rank's
    monitor calls `follow` each second and so ends as well, wherever its main thread is.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._store: Any = None
        self._leaving = threading.Lock()
        self.before: list[Callable[[], None]] = []
        """Called before the process ends, such as what gives up a lock."""
        self.in_order: list[Callable[[], None]] = []
        """Called before it ends with status 0."""

    def join(self, store: dist.Store) -> None:
        """Communicates with the other ranks through `store`, a connection that no other thread waits in."""
        self._store = store

    def leave(self, status: int, sentence: str = "", *, reason: str = "", tell: bool = True) -> NoReturn:
        """Prints `sentence` on standard error and ends the process; the others get it, or `reason` in its place."""
        self._leaving.acquire()  # never released: another thread that wants to leave waits for the end
        with suppress(OSError, ValueError):
            if sentence:
                # in one piece, since other ranks may write to the same terminal
                print(sentence + "\n", end="", file=sys.stderr if status else sys.stdout, flush=True)
        if tell and self._store is not None:
            word = json.dumps([status, self._rank, reason or sentence.removeprefix("error: ")])
            telling = threading.Thread(target=self._tell, args=(word,), daemon=True)
            telling.start()
            telling.join(_TELLING)
        for action in (*self.before, *(() if status else self.in_order)):
            with suppress(OSError):
                action()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, SystemExit):
                if stream is not None:
                    stream.flush()
        os._exit(status)

    def told(self) -> tuple[int, int, str] | None:
        """Status, rank and reason of the rank that ended first, None if none has ended."""
        if self._store is None:
            return None
        with suppress(RuntimeError):  # the store is gone with the job's launcher
            if self._store.check([_KEY]):
                status, rank, reason = json.loads(self._store.get(_KEY))
                return status, rank, reason
        return None

    def follow(self) -> None:
        """Ends this rank if another one has ended; the first rank repeats the reason."""
        word = self.told()
        if word is None or word[1] == self._rank:
            return
        status, rank, reason = word
        sentence = f"error: rank {rank} has ended: {reason}" if status else reason
        self.leave(status, sentence if self._rank == 0 else "", tell=False)

    def _tell(self, word: str) -> None:
        with suppress(RuntimeError):
            self._store.compare_set(_KEY, "", word)
