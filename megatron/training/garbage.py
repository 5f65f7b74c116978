"""Python's garbage collector, run when all ranks run it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.training.config import TrainingConfig


class GarbageCollection:
    """Collects at chosen steps with --manual-gc; otherwise leaves it to Python, which collects on each rank for itself.

    A rank that collects while the others compute keeps all of them waiting at the next message, one after another.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._manual = config.manual_gc
        self._interval = config.manual_gc_interval
        self._around_evaluations = config.manual_gc and not config.no_manual_gc_eval

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keeps Python from collecting by itself within."""
        if not (self._manual and gc.isenabled()):
            yield
            return
        gc.disable()
        gc.collect()
        try:
            yield
        finally:
            gc.enable()

    def step(self, iteration: int) -> None:
        """After each step."""
        if self._manual and self._interval and iteration % self._interval == 0:
            gc.collect()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation, which leaves other garbage than steps do."""
        if self._around_evaluations:
            gc.collect()
        yield
        if self._around_evaluations:
            gc.collect()
