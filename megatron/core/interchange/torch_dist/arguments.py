"""The training arguments in a folder of Megatron-LM's `torch_dist` format."""

from argparse import Namespace
from typing import Any

from megatron.core.interchange.torch_archive import Window
from megatron.core.interchange.torch_dist.tensors import CheckpointFolder
from megatron.core.interchange.torch_file import index_torch, index_value

_COMMON_FILE = "common.pt"
# From Megatron-Core 0.19 on, what was in the file is an object of the checkpoint.
_COMMON_STATE = "common_state"


def saved_arguments(checkpoint: CheckpointFolder) -> Namespace:
    """The `args` of the run that saved it. Raises ValueError without them.

    Values of classes that are not plain stand for nothing there: they are neither imported nor called.
    """
    path = checkpoint.folder / _COMMON_FILE
    if path.is_file():
        common: Any = index_torch(path, foreign=True)
    else:
        places = [place for key, place in checkpoint.catalog.objects.items() if key.split("/")[0] == _COMMON_STATE]
        if not places:
            raise ValueError(
                f"{checkpoint.folder} has neither {_COMMON_FILE} nor {_COMMON_STATE}: files are missing, or another "
                "program than Megatron-LM wrote it"
            )
        path = checkpoint.folder / places[0].file
        common = index_value(path, Window(places[0].offset, places[0].length), foreign=True)
        common = common[0] if isinstance(common, list) and common else common
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, Namespace):
        raise ValueError(
            f"{path} has no training arguments ('args'), which Megatron-LM's training saves, but not NeMo: the shape "
            "of the model is not known"
        )
    return args
