"""Reading and writing of Megatron's checkpoint folders: names, tracker, files and the arguments inside them."""

from megatron.core.interchange.arguments import model_args_namespace, model_config_from_args
from megatron.core.interchange.layout import (
    CHECKPOINT_FILE,
    CHECKPOINT_VERSION,
    TRACKER_FILE,
    Layout,
    Step,
    abandon_step,
    available_iterations,
    available_layout,
    begin_step,
    checkpoint_dir,
    commit_step,
    find_checkpoint,
    rank_dir_name,
    read_tracker,
    replace_step,
    write_tracker,
)
from megatron.core.interchange.torch_file import load_torch, save_torch

__all__ = [
    "CHECKPOINT_FILE",
    "CHECKPOINT_VERSION",
    "TRACKER_FILE",
    "Layout",
    "Step",
    "abandon_step",
    "available_iterations",
    "available_layout",
    "begin_step",
    "checkpoint_dir",
    "commit_step",
    "find_checkpoint",
    "load_torch",
    "model_args_namespace",
    "model_config_from_args",
    "rank_dir_name",
    "read_tracker",
    "replace_step",
    "save_torch",
    "write_tracker",
]
