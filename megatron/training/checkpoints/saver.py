"""Saving a run: what is written when, by whom, and when a step is in its place."""

import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron.core import collectives, interchange
from megatron.core.atomic_files import error_sentence
from megatron.core.parallel_state import ProcessGroups
from megatron.training.checkpoints.formats import SAVED_FORMATS
from megatron.training.checkpoints.protocol import StepToSave
from megatron.training.checkpoints.steps import remove_leftovers, remove_old_steps
from megatron.training.config import Arguments
from megatron.training.initialize import SharedError, largest, print_once, together
from megatron.training.progress import Progress, RunRecord
from megatron.training.setup import Trainer

T = TypeVar("T")


def checkpoint_namespace(arguments: Arguments, progress: Progress) -> Any:
    """The `args` of a checkpoint: every setting of the run, as plain values."""
    values: dict[str, object] = {}
    for section in (
        arguments.optimizer, arguments.tokenizer, arguments.data, arguments.training, arguments.parallel,
        arguments.checkpoint,
    ):  # fmt: skip
        values |= {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(section).items()}
    chunks = len(arguments.parallel.stages(arguments.model.num_layers)[0])
    values["virtual_pipeline_model_parallel_size"] = chunks if chunks > 1 else None
    values["expert_tensor_parallel_size"] = arguments.parallel.expert_tensor_parallel
    values |= {"iteration": progress.iteration, "consumed_train_samples": progress.consumed_samples}
    parallel = arguments.parallel
    layout = interchange.Layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    return interchange.model_args_namespace(arguments.model, layout, arguments.data.seq_length, values)


class _BackgroundWriter(threading.Thread):
    """Runs `write` while training goes on; keeps what it returns, or why it failed."""

    def __init__(self, write: Callable[[], object]) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self._write = write
        self.result: object = None
        self.error: str | None = None

    def run(self) -> None:
        try:
            self.result = self._write()
        except (ValueError, OSError) as error:
            self.error = error_sentence(error)
        except Exception as error:  # a thread's exception would otherwise end in nothing but a printed traceback
            self.error = f"{type(error).__name__}: {error}"


class CheckpointSaver:
    """Saves steps of a run that are either whole or absent, one at a time.

    All methods are collective. What fails on one rank raises SharedError on all of them; `check_lock` fails if this job
    may not save any more.
    """

    def __init__(self, trainer: Trainer, record: RunRecord, check_lock: Callable[[], None] = lambda: None) -> None:
        assert trainer.arguments.checkpoint.save is not None
        self.trainer, self.groups, self.settings = trainer, trainer.groups, trainer.arguments.checkpoint
        self._record, self._check_lock = record, check_lock
        self._root = Path(trainer.arguments.checkpoint.save)
        self._writer: _BackgroundWriter | None = None
        self._iteration = 0
        self._host_memory: list[Tensor] = []
        self._commit: Callable[[list[Any]], object] = lambda written: None

    def save(self, progress: Progress) -> None:
        """Saves the state as it is now; with --async-save it returns when that is copied to host memory.

        A save that is still under way is finished first.
        """
        self.finish()
        self._iteration = progress.iteration
        together(self._check_lock, self.groups)
        try:
            folder = together(lambda: interchange.begin_step(self._root, self._iteration), self.groups)
            step = StepToSave(
                root=self._root,
                folder=folder,
                trainer=self.trainer,
                progress=replace(progress),  # which goes on while a step is written in the background
                record=self._record,
                namespace=checkpoint_namespace(self.trainer.arguments, progress),
                host_memory=self._host_memory,
            )
            write, self._commit = SAVED_FORMATS[self.settings.ckpt_format].prepare(step)
            if self.settings.async_save:
                self._writer = _BackgroundWriter(write)
                self._writer.start()
                print_once(self.groups, f"saving iteration {self._iteration} to {self._root} in the background")
            else:
                self._finish_step(together(write, self.groups))
        except SharedError:
            self._abandon()
            raise

    def poll(self, device: torch.device | None = None) -> None:
        """Puts a step in its place if all ranks have written their part of it in the background.

        With the `device` of a run between two of its steps, see `largest`.
        """
        if self._writer is None:
            return
        # asked after every step: two numbers, and only a failure takes words
        writing, failed = largest((self._writer.is_alive(), self._writer.error is not None), self.groups, device)
        if failed or not writing:
            writer, self._writer = self._writer, None
            try:
                together(lambda: _raise(f"iteration {self._iteration} could not be saved", writer.error), self.groups)
                self._finish_step(writer.result)
            except SharedError:
                self._abandon()
                raise

    def finish(self) -> None:
        """Waits for a save that is under way."""
        if self._writer is not None:
            self._writer.join()
            self.poll()

    def _finish_step(self, written: object) -> None:
        """Completes the step from what each rank has written, and removes older ones that are not wanted any more."""
        parts = _gather_to_first(written, self.groups)
        kept = self.settings.keep_last_checkpoints, self.settings.save_retain_interval

        def commit() -> None:
            if self.groups.world.is_first:
                self._check_lock()
                self._commit(parts)
                remove_leftovers(self._root)
                remove_old_steps(self._root, self._iteration, *kept)

        together(commit, self.groups)
        print_once(self.groups, f"saved iteration {self._iteration} to {self._root}")

    def _abandon(self) -> None:
        self._writer = None
        if self.groups.world.is_first:
            interchange.abandon_step(self._root, self._iteration)


def _gather_to_first(value: T, groups: ProcessGroups) -> list[T]:
    """Every rank's value, on the first rank; none on the others."""
    if groups.control.size == 1:
        return [value]
    values: list[Any] | None = [None] * groups.control.size if groups.control.is_first else None
    collectives.gather_object(value, values, dst=groups.control.ranks[0], group=groups.control.handle)
    return values or []


def _raise(what: str, error: str | None) -> None:
    if error is not None:
        raise ValueError(f"{what}: {error}")
