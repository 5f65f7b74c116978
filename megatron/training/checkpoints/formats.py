"""The table of checkpoint formats, and the format of a folder."""

from pathlib import Path

from megatron.core.interchange.folder_kind import is_torch_dist, not_a_checkpoint
from megatron.training.checkpoints.per_rank import PerRank
from megatron.training.checkpoints.protocol import CheckpointFormat
from megatron.training.checkpoints.sharded import Sharded

FORMATS: dict[str, CheckpointFormat] = {"sharded": Sharded(), "torch": PerRank()}
"""Every format by its value of --ckpt-format, in the order in which a folder is compared with them."""


def format_of(folder: Path) -> CheckpointFormat:
    """The format of a step, by what is in its folder. Raises ValueError if it is of none."""
    for candidate in FORMATS.values():
        if candidate.is_mine(folder):
            return candidate
    if is_torch_dist(folder):
        raise ValueError(
            f"{folder} is a torch_dist checkpoint of Megatron-LM, which training does not start from: convert it first "
            f"with python tools/checkpoint/util.py --loader mixtral --saver mixtral --load-dir {folder} --save-dir "
            "NEW_FOLDER"
        )
    kind = not_a_checkpoint(folder) or "holds no checkpoint: neither mp_rank_* folders nor sharded.json"
    raise ValueError(f"{folder} {kind}")


def is_complete(folder: Path) -> bool:
    """Whether a step's folder has all its files; their checksums are not compared."""
    try:
        return format_of(folder).is_complete(folder)
    except (ValueError, OSError):
        return False
