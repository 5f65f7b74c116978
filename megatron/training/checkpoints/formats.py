"""The table of checkpoint formats, and the format of a folder."""

from pathlib import Path

from megatron.core.interchange.folder_kind import not_a_checkpoint
from megatron.training.checkpoints.per_rank import PerRank
from megatron.training.checkpoints.protocol import CheckpointFormat, SavedFormat
from megatron.training.checkpoints.sharded import Sharded
from megatron.training.checkpoints.torch_dist import TorchDist

SAVED_FORMATS: dict[str, SavedFormat] = {"sharded": Sharded(), "torch": PerRank()}
"""Every format that is saved, by its value of --ckpt-format."""
FORMATS: tuple[CheckpointFormat, ...] = (*SAVED_FORMATS.values(), TorchDist())
"""Every format that is loaded, in the order in which a folder is compared with them."""


def format_of(folder: Path) -> CheckpointFormat:
    """The format of a step, by what is in its folder. Raises ValueError if it is of none."""
    for candidate in FORMATS:
        if candidate.is_mine(folder):
            return candidate
    kind = not_a_checkpoint(folder) or "holds no checkpoint: neither mp_rank_* folders nor sharded.json nor .metadata"
    raise ValueError(f"{folder} {kind}")


def is_complete(folder: Path) -> bool:
    """Whether a step's folder has all its files; their checksums are not compared."""
    try:
        return format_of(folder).is_complete(folder)
    except (ValueError, OSError):
        return False
