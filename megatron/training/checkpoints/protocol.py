"""What a checkpoint format has to do, and what it is given for that."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.training.config import Arguments
from megatron.training.progress import Progress, RunRecord
from megatron.training.setup import Trainer


@dataclass(frozen=True, kw_only=True)
class StepToSave:
    """A step on this rank, and where it goes."""

    root: Path
    """The folder of all steps."""
    folder: Path
    """The hidden folder that the step is written to before it is moved to its place."""
    trainer: Trainer
    progress: Progress
    record: RunRecord
    namespace: Any
    """Every setting of the run as attributes, plain values all of them."""
    host_memory: list[Tensor]
    """Memory for copies of the state, kept from step to step."""

    @property
    def optimizer(self) -> MixedPrecisionOptimizer | None:
        """None if its state is not saved."""
        return None if self.trainer.arguments.checkpoint.no_save_optim else self.trainer.optimizer


class PreparedStep(NamedTuple):
    """The two things left to do for a step, neither of them collective."""

    write: Callable[[], object]
    """Writes this rank's part, perhaps in the background."""
    commit: Callable[[list[Any]], object]
    """On the first rank: puts the step in its place, from what `write` returned on each rank."""


class LoadedState(NamedTuple):
    """What a checkpoint held besides tensors."""

    arguments: Any
    """Every setting of the run that saved it, as attributes."""
    progress: dict[str, Any]
    """What `to_saved` made of how far that run had come."""
    remark: str = ""
    """What was loaded and what was not, where that is not the same as of other formats."""


class CheckpointFormat(Protocol):
    """A way to store a step in a folder, at least to load it."""

    def is_mine(self, folder: Path) -> bool:
        """Whether a step's folder is in this format, whole or damaged."""

    def is_complete(self, folder: Path) -> bool:
        """Whether all files are there, their checksums not compared. Raises ValueError or OSError if it cannot tell."""

    def arguments(self, folder: Path) -> Any:
        """Every setting of the run that saved a step, as attributes. Raises ValueError if it has none."""

    def load(self, source: "CheckpointSource", trainer: Trainer) -> LoadedState:
        """Loads the weights and, as `source` says, the optimizer and the random state; collective.

        Nothing changes unless the whole checkpoint fits and is undamaged. Raises SharedError on every rank otherwise.
        """


class SavedFormat(CheckpointFormat, Protocol):
    """One that training saves, too."""

    def check_layout(self, arguments: Arguments) -> None:
        """Raises ValueError if the run's layout cannot be saved."""

    def prepare(self, step: StepToSave) -> PreparedStep:
        """Makes ready to write a step; collective. With --async-save later updates do not reach what is written."""

    def rehearse(self, optimizer: MixedPrecisionOptimizer) -> None:
        """Takes the memory of the optimizer's device that saving its state would take, and keeps and writes nothing."""


@dataclass(frozen=True)
class CheckpointSource:
    """The checkpoint a run starts from, and how much of it is taken."""

    folder: Path
    format: CheckpointFormat
    weights_only: bool
    """Whether the run begins at iteration 0, rather than where the checkpoint was saved."""
    with_optimizer: bool
    with_rng: bool
    remark: str = ""
