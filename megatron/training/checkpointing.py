"""Saving and resuming a run: what is written when, by whom, and what a run takes of the checkpoint it starts from."""

import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megatron.core import collectives as dist
from megatron.core import dist_checkpointing, interchange
from megatron.core.atomic_files import error_sentence
from megatron.core.models.mixtral.mixtral_model import ModelChunks
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.parallel_state import ProcessGroups
from megatron.training.changed_settings import changed_settings
from megatron.training.checkpoint_source import CheckpointSource, LoadedState, checkpoint_model, locate_checkpoint
from megatron.training.checkpoint_steps import remove_leftovers, remove_old_steps
from megatron.training.config import Arguments
from megatron.training.global_checkpoints import checkpoint_shards, load_state, plain_state, rng_shards
from megatron.training.initialize import SharedError, largest, print_once, together
from megatron.training.progress import Progress
from megatron.training.rank_checkpoints import interchange_layout, load_rank_file, rank_file_writer

__all__ = [
    "CheckpointSaver",
    "CheckpointSource",
    "Progress",
    "checkpoint_model",
    "interchange_layout",
    "load_checkpoint",
    "locate_checkpoint",
    "save_checkpoint",
]

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
    """Runs `write` beside the training; keeps what it returns, or why it failed."""

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

    def __init__(
        self, arguments: Arguments, groups: ProcessGroups, check_lock: Callable[[], None] = lambda: None
    ) -> None:
        assert arguments.checkpoint.save is not None
        self.arguments, self.groups = arguments, groups
        self._check_lock = check_lock
        self._root = Path(arguments.checkpoint.save)
        self._writer: _BackgroundWriter | None = None
        self._iteration = 0
        self._host_memory: list[Tensor] = []
        self._commit: Callable[[list[Any]], None] = lambda written: None

    def save(self, model: ModelChunks, optimizer: MixedPrecisionOptimizer, progress: Progress) -> None:
        """Saves the state as it is now; with --async-save it returns when that is copied to host memory.

        A save that is still under way is finished first.
        """
        self.finish()
        self._iteration = progress.iteration
        prepare = self._prepare_rank_file if self.arguments.checkpoint.ckpt_format == "torch" else self._prepare_shards
        together(self._check_lock, self.groups)
        try:
            folder = together(lambda: interchange.begin_step(self._root, self._iteration), self.groups)
            write = prepare(folder, model, optimizer, progress)
            if self.arguments.checkpoint.async_save:
                self._writer = _BackgroundWriter(write)
                self._writer.start()
                print_once(self.groups, f"saving iteration {self._iteration} to {self._root} in the background")
            else:
                self._finish_step(together(write, self.groups))
        except SharedError:
            self._abandon()
            raise

    def poll(self) -> None:
        """Puts a step in its place if all ranks have written their part of it in the background."""
        if self._writer is None:
            return
        # asked after every step: two numbers, and only what has failed is told in words
        writing, failed = largest((self._writer.is_alive(), self._writer.error is not None), self.groups)
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

    def _prepare_rank_file(
        self, folder: Path, model: ModelChunks, optimizer: MixedPrecisionOptimizer, progress: Progress
    ) -> Callable[[], object]:
        layout = interchange_layout(self.arguments)

        def commit(_: list[Any]) -> None:
            interchange.commit_step(self._root, self._iteration, layout)

        self._commit = commit
        namespace = checkpoint_namespace(self.arguments, progress)
        return rank_file_writer(folder, self.arguments, self.groups, model, optimizer, progress, namespace)

    def _prepare_shards(
        self, folder: Path, model: ModelChunks, optimizer: MixedPrecisionOptimizer, progress: Progress
    ) -> Callable[[], object]:
        settings = self.arguments.checkpoint
        saved = None if settings.no_save_optim else optimizer
        arguments, state = vars(checkpoint_namespace(self.arguments, progress)), plain_state(asdict(progress), saved)
        shards = checkpoint_shards(model, saved, self.groups) + rng_shards(self.groups)
        if settings.async_save:
            shards = dist_checkpointing.snapshot(shards, self._host_memory)

        def commit(written: list[Any]) -> None:
            metadata = dist_checkpointing.write_metadata(
                folder, written, iteration=self._iteration, arguments=arguments, state=state
            )
            interchange.replace_step(self._root, self._iteration, dist_checkpointing.step_files(metadata))

        self._commit = commit
        return lambda: dist_checkpointing.write_shards(folder, self.groups.world.rank, shards)

    def _finish_step(self, written: object) -> None:
        """Completes the step from what each rank has written, and removes older ones that are not wanted any more."""
        parts = _gather_to_first(written, self.groups)
        settings = self.arguments.checkpoint

        def commit() -> None:
            if self.groups.world.is_first:
                self._check_lock()
                self._commit(parts)
                remove_leftovers(self._root)
                remove_old_steps(
                    self._root, self._iteration, settings.keep_last_checkpoints, settings.save_retain_interval
                )

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
    dist.gather_object(value, values, dst=groups.control.ranks[0], group=groups.control.handle)
    return values or []


def _raise(what: str, error: str | None) -> None:
    if error is not None:
        raise ValueError(f"{what}: {error}")


def save_checkpoint(
    arguments: Arguments,
    groups: ProcessGroups,
    model: ModelChunks,
    optimizer: MixedPrecisionOptimizer,
    progress: Progress,
) -> None:
    """Saves a step and waits until it is in its place; collective. Raises SharedError on every rank if any fails."""
    saver = CheckpointSaver(arguments, groups)
    saver.save(model, optimizer, progress)
    saver.finish()


def load_checkpoint(
    source: CheckpointSource | None,
    arguments: Arguments,
    groups: ProcessGroups,
    model: ModelChunks,
    optimizer: MixedPrecisionOptimizer,
) -> tuple[Progress, str]:
    """Loads what `locate_checkpoint` found, and says what was loaded and what was not; collective.

    Nothing is changed unless all of it fits. Raises SharedError on every rank otherwise.
    """
    if source is None:
        load = arguments.checkpoint.load
        return Progress(), (f"no checkpoint in {load} yet: " if load else "") + "starting from freshly drawn weights"
    load_format = load_state if source.format == "torch_dist" else load_rank_file
    loaded = load_format(source, arguments, groups, model, optimizer)
    if source.weights_only:
        return Progress(), f"loaded the weights of {source.folder}; optimizer, schedule and data start anew"
    progress = Progress(**loaded.progress)
    taken = ["weights", "schedule and data position"]
    left: list[str] = []
    (taken if source.with_optimizer else left).insert(1, "optimizer (masters and moments)")
    (taken if source.with_rng else left).append("random state")
    lines = [f"resumed at iteration {progress.iteration} from {source.folder}: loaded {', '.join(taken)}"]
    if left:
        lines.append(f"not loaded, as asked for: {', '.join(left)}")
    lines += [source.remark, _changed_settings(loaded, arguments)]
    return progress, "\n".join(line for line in lines if line)


def _changed_settings(loaded: LoadedState, arguments: Arguments) -> str:
    """A remark if the resumed run computes otherwise than before."""
    changed = changed_settings(vars(loaded.arguments), asdict(arguments))
    return f"WARNING: changed since the checkpoint was saved: {'; '.join(changed)}" if changed else ""
