"""How far a run has come, and what it was begun with: what a checkpoint holds besides tensors and settings."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    """Finished steps."""
    consumed_samples: int = 0
    """Samples read, which is the position in the data."""
    scheduled_samples: int = 0
    """Samples that updates were made from, which is the position in the learning-rate schedule."""
    skipped_iterations: int = 0
    """Steps without an update, because gradients were not finite."""
    tokens_per_expert: list[list[int]] | None = None
    """How often each expert of each layer was chosen in the last step, for --moe-router-load-balancing-type
    global_aux_loss."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What stays the same from step to step, and what a resumed run compares itself with."""

    schedule: dict[str, Any] = field(default_factory=dict)
    """Settings of learning rate and weight decay over the run, which a resumed run must share."""
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    """What is in the files that are trained on, so that a resumed run notices if they were replaced."""
    grouped_gemm: dict[str, str] = field(default_factory=dict)
    """What was measured to make the products of the experts fastest, by device and shape, so that a resumed run
    computes as before."""


def to_saved(progress: Progress, record: RunRecord) -> dict[str, Any]:
    """Both as one dictionary of plain values, as every checkpoint has it."""
    return asdict(progress) | asdict(record)


def from_saved(saved: dict[str, Any]) -> tuple[Progress, RunRecord]:
    """The two parts of such a dictionary; what an older one lacks is empty."""
    names = {field.name for field in fields(Progress)}
    progress = Progress(**{name: value for name, value in saved.items() if name in names})
    return progress, RunRecord(**{name: value for name, value in saved.items() if name not in names})
