"""How far a run has come."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """How far a run has come; saved with every checkpoint."""

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
    schedule: dict[str, Any] = field(default_factory=dict)
    """Settings of learning rate and weight decay over the run, which a resumed run must share."""
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    """What is in the files that are trained on, so that a resumed run notices if they were replaced."""
    grouped_gemm: dict[str, str] = field(default_factory=dict)
    """What was measured to make the products of the experts fastest, by device and shape, so that a resumed run
    computes as before."""
