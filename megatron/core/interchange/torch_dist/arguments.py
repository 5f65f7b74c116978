"""What all ranks shared that saved a folder of Megatron-LM's `torch_dist` format; above all the training arguments."""

from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.interchange.stored_tensor import ZipRecords
from megatron.core.interchange.torch_archive import Window, is_archive
from megatron.core.interchange.torch_dist.tensors import CheckpointFolder
from megatron.core.interchange.torch_file import archive_records, index_torch, index_value

_COMMON_FILE = "common.pt"
# From Megatron-Core 0.19 on, what was in the file is an object of the checkpoint.
_COMMON_STATE = "common_state"


class Common(NamedTuple):
    """What all ranks shared, and where it is kept."""

    values: dict[Any, Any]
    """Tensors are `TensorEntry`."""
    args: Namespace
    path: Path
    window: Window | None
    """The part of the file, if not all of it."""


def read_common(checkpoint: CheckpointFolder) -> Common:
    """Reads it, and compares its checksums. Raises ValueError without training arguments.

    Values of classes that are not plain stand for nothing there: they are neither imported nor called.
    """
    path, window = checkpoint.folder / _COMMON_FILE, None
    if path.is_file():
        _check_sums(path, None)
        common: Any = index_torch(path, foreign=True)
    else:
        places = [place for key, place in checkpoint.catalog.objects.items() if key.split("/")[0] == _COMMON_STATE]
        if not places:
            raise ValueError(
                f"{checkpoint.folder} has neither {_COMMON_FILE} nor {_COMMON_STATE}: files are missing, or another "
                "program than Megatron-LM wrote it"
            )
        path = checkpoint.folder / places[0].file
        window = Window(places[0].offset, places[0].length)
        _check_sums(path, window)
        common = index_value(path, window, foreign=True)
        common = common[0] if isinstance(common, list) and common else common
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, Namespace):
        raise ValueError(
            f"{path} has no training arguments ('args'), which Megatron-LM's training saves, but not NeMo: the shape "
            "of the model is not known"
        )
    return Common(common, args, path, window)


def saved_arguments(checkpoint: CheckpointFolder) -> Namespace:
    """The `args` of the run that saved it. Raises ValueError without them."""
    return read_common(checkpoint).args


def _check_sums(path: Path, window: Window | None) -> None:
    if window is None and not is_archive(path):  # of before torch 1.6
        return
    records = ZipRecords(path, window)
    for record in archive_records(path, window).values():
        records.verify(record.start)
