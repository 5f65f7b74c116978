"""The phases of a run one after another, with what is alive of the device's memory in each of them."""

import contextlib
import gc
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar
from unittest import mock

import torch

import pretrain_gpt
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import initialize_parameters
from megatron.training import evaluation, setup
from megatron.training.checkpoints.saver import CheckpointSaver
from megatron.training.checkpoints.source import load_checkpoint, locate_checkpoint
from megatron.training.config import Arguments, CheckpointConfig
from megatron.training.dry_run import DryRun
from megatron.training.live_memory import LiveMemory
from megatron.training.loader import Batch
from megatron.training.progress import Progress, RunRecord
from megatron.training.setup import Trainer, build_trainer
from megatron.training.training import train_step
from megatron.training.warm_up import warm_up

T = TypeVar("T")
TOLERANCE = 0.03
"""Of what is predicted."""


class Memory(Protocol):
    """Counts bytes of tensors on a device; `peak` is the largest `live` since it was last set."""

    live: int
    peak: int


class TensorMemory(LiveMemory):
    """That of a CPU's tensors, which have values."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carries an operation out."""
        return func(*args, **kwargs)


class CudaMemory:
    """A GPU's, as torch counts it."""

    @property
    def live(self) -> int:
        """Allocated now."""
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        """The most since it was set."""
        return torch.cuda.max_memory_allocated()

    @peak.setter
    def peak(self, _: int) -> None:
        torch.cuda.reset_peak_memory_stats()


@dataclass
class Counted:
    """Bytes by phase, besides what was alive before the first."""

    peaks: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    """Alive when a phase was over."""


class PhaseCounter:
    """Runs phases of a run on one rank and counts them."""

    def __init__(self, arguments: Arguments, groups: ProcessGroups, device: torch.device, memory: Memory) -> None:
        self.arguments, self.groups, self.device, self.memory = arguments, groups, device, memory
        self.before, self.counted = 0, Counted()

    def phase(self, name: str, function: Callable[[], T]) -> T:
        """Runs `function` and counts."""
        self.memory.peak = before = self.memory.live
        with contextlib.redirect_stdout(io.StringIO()):
            result = function()
        self.counted.peaks[name] = self.memory.peak - self.before
        if self.memory.live > before:
            gc.collect()
        self.counted.after[name] = self.memory.live - self.before
        return result

    def build(self, name: str, checkpoint: CheckpointConfig | None = None, initialize: bool = False) -> Trainer:
        """A trainer; what model and buffers took is counted apart, under `buffers`.

        Memory of an earlier one does not count: hooks of autograd keep its buffers for as long as the process lasts.
        """
        gc.collect()
        self.before = self.memory.live
        optimizer = setup.MixedPrecisionOptimizer

        def note_and_build(*args: Any) -> Any:
            self.counted.peaks["buffers"] = self.memory.peak - self.before
            return optimizer(*args)

        arguments = replace(self.arguments, checkpoint=checkpoint or self.arguments.checkpoint)
        providers = pretrain_gpt.model_provider, pretrain_gpt.forward_step
        with mock.patch.object(setup, "MixedPrecisionOptimizer", note_and_build):
            return self.phase(
                name, lambda: build_trainer(arguments, self.groups, self.device, *providers, initialize=initialize)
            )

    def train(self, trainer: Trainer, source: Callable[[], Iterator[Batch]]) -> Progress:
        """The kernels' warm-up, two steps and an evaluation."""
        progress = Progress()
        self.phase("warm-up", lambda: warm_up(trainer, source(), evaluates=True))
        for step in ("first step", "step"):
            self.phase(step, lambda: train_step(trainer, source(), progress))
            trainer.buffers.wait_for_parameters()
        with mock.patch.object(evaluation, "batches", lambda *_: source()):
            self.phase("evaluation", lambda: evaluation.evaluate(trainer, None))
        return progress

    def save(self, trainer: Trainer, progress: Progress, name: str, checkpoint: CheckpointConfig) -> None:
        """Saves as `checkpoint` says."""
        changed = replace(trainer, arguments=replace(trainer.arguments, checkpoint=checkpoint))
        saver = CheckpointSaver(changed, RunRecord())
        self.phase(name, lambda: (saver.save(progress), saver.finish()))

    def load(self, name: str, checkpoint: CheckpointConfig) -> None:
        """A new trainer that loads."""
        trainer = self.build(f"build to {name}", checkpoint)
        source = locate_checkpoint(trainer.arguments, self.groups)
        self.phase(name, lambda: load_checkpoint(source, trainer))


def count_phases(
    counter: PhaseCounter,
    source: Callable[[], Iterator[Batch]],
    folder: Path,
    formats: tuple[tuple[str, bool], ...],
    drawn_on_device: bool = False,
) -> Counted:
    """All phases; `formats` of checkpoints, each with whether it is written in the background.

    Where the device is the host's memory, `drawn_on_device`, the weights are drawn before anything is counted.
    """
    trainer = counter.build("build", initialize=not drawn_on_device)
    if drawn_on_device:
        for chunk in trainer.model:
            initialize_parameters(chunk, chunk.first_layer, 1)
        trainer.optimizer.reload_masters()
    progress = counter.train(trainer, source)
    names = {f"{kind}{' in the background' * background}": (kind, background) for kind, background in formats}
    for name, (kind, background) in names.items():
        where = CheckpointConfig(save=str(folder / name), ckpt_format=kind, async_save=background)  # type: ignore[arg-type]
        counter.save(trainer, progress, f"save {name}", where)
    del trainer
    for name in names:
        counter.load(f"load {name}", CheckpointConfig(load=str(folder / name), no_load_rng=True))
    return counter.counted


def problems(counted: Counted, predicted: DryRun) -> list[str]:
    """Phases whose peak is not what was predicted, or after which more is alive than before the first step."""
    state = predicted.weights + predicted.gradients + predicted.chosen_optimizer
    expected = {"buffers": predicted.weights + predicted.gradients}
    for name in counted.peaks:
        kind = next((kind for kind in predicted.peaks if kind in name.split()), None)
        expected.setdefault(name, predicted.peaks[kind] if kind is not None else predicted.peaks["step"])
    found = []
    for name, size in counted.peaks.items():
        low = 0 if name == "warm-up" else (1 - TOLERANCE) * expected[name]
        if not low <= size <= (1 + TOLERANCE) * expected[name]:
            found.append(f"{name}: {size:,} bytes at most, {expected[name]:,} predicted")
    for name, size in counted.after.items():
        if size > (1 + TOLERANCE / 3) * state:
            found.append(f"{name}: {size:,} bytes are left, of a state of {state:,}")
    return found
