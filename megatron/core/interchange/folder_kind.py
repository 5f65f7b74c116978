"""What a folder holds that should hold a model or a checkpoint, by the names in it, and what to do if neither is there.

Nothing is opened, so that it can be asked before anything else, by tools and by training.
"""

import os
import shlex
from pathlib import Path

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE_FILE, OLD_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHT_FILES = (SINGLE_FILE, INDEX_FILE, OLD_SINGLE_FILE, OLD_INDEX_FILE)
"""Where a Hugging Face folder's weights begin, in the order in which transformers looks."""

SHARDED_FILE = "sharded.json"
"""What describes a step in the sharded format."""
METADATA_FILE = "metadata.json"
"""Its name in earlier steps; Megatron-LM's torch_dist has a file of that name, too."""

_ADAPTER = "adapter_config.json"
# The first pattern that something in the folder matches says what it is.
_FOREIGN = (
    (("*.gguf",), "holds a GGUF, whose weights are quantized: use the model folder (safetensors) it was made from"),
    (
        ("params.json", "consolidated.*"),
        "is a release in Mistral's own format (params.json, consolidated.*): download the Hugging Face version of the "
        "model, or convert it with transformers' convert_mixtral_weights_to_hf.py",
    ),
    (
        (".metadata", "*.distcp", "*/*.distcp"),
        "is a checkpoint of torch.distributed.checkpoint: if Megatron-LM wrote it, give the folder of a step "
        "(iter_NNNNNNN) to --load or to tools/checkpoint/util.py --loader mixtral, otherwise merge it with the program "
        "that did (accelerate: accelerate merge-weights)",
    ),
    (
        ("zero_to_fp32.py", "global_step*", "*_zero_pp_rank_*"),
        "is a DeepSpeed checkpoint: merge it first, with DeepSpeed's zero_to_fp32.py",
    ),
    (
        ("checkpoint-*/config.json", "checkpoint-*/" + _ADAPTER),
        "is a folder of a trainer's checkpoints: give one of its checkpoint-N folders",
    ),
    (("tf_model*.h5", "flax_model*.msgpack"), "holds weights for TensorFlow or Flax only: save them for PyTorch first"),
    (("*.nemo",), "holds a NeMo archive: convert it to Hugging Face's format with NeMo first"),
)


def is_model_folder(folder: Path) -> bool:
    """Whether weights of a Hugging Face model are in `folder`, links to nothing included."""
    return any(os.path.lexists(folder / name) for name in WEIGHT_FILES)


def is_sharded(folder: Path) -> bool:
    """Whether a step's folder is in the sharded format (`--ckpt-format sharded`), whole or damaged."""
    return _has_sharded_names(folder) or ((folder / METADATA_FILE).is_file() and not is_torch_dist(folder))


def is_torch_dist(folder: Path) -> bool:
    """Whether a step's folder is in the torch_dist format of Megatron-LM, whose description is a pickle."""
    has_its_names = (folder / ".metadata").exists() or any(folder.glob("*.distcp"))
    return has_its_names and not _has_sharded_names(folder)


def _has_sharded_names(folder: Path) -> bool:
    return (folder / SHARDED_FILE).is_file() or any(folder.glob("rank_*.safetensors"))


def sharded_file(folder: Path) -> Path:
    """What describes a step in the sharded format, under the name it has there."""
    path, old = folder / SHARDED_FILE, folder / METADATA_FILE
    return old if old.is_file() and not path.is_file() else path


def is_per_rank(folder: Path) -> bool:
    """Whether a step's folder is in the per-rank format (`--ckpt-format torch`), whole or damaged."""
    return any(folder.glob("mp_rank_*"))


def is_adapter(folder: Path) -> bool:
    """Whether transformers would take `folder` for an adapter of another model."""
    return os.path.lexists(folder / _ADAPTER)


def foreign_kind(folder: Path) -> str | None:
    """What `folder` is if it is neither a model nor a checkpoint, and what to do: a sentence without its subject."""
    if is_adapter(folder):
        return (
            f"is a LoRA adapter ({_ADAPTER}), not a model: merge it into its model first (peft: merge_and_unload, then "
            f"save_pretrained), or remove {_ADAPTER} if the weights in this folder are merged"
        )
    snapshots = _snapshots(folder)
    if snapshots:
        return f"is the hub's cache, not a model folder: give {' or '.join(map(str, snapshots[:3]))}"
    for patterns, sentence in _FOREIGN:
        if any(next(folder.glob(pattern), None) is not None for pattern in patterns):
            return sentence
    return None


def what_is_there(folder: Path) -> str:
    """The names in a folder that lacks a file, in a few words behind its own."""
    names = sorted(os.listdir(folder))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"there are {', '.join(names[:5])}{more}" if names else "it is empty"


def not_a_checkpoint(folder: Path) -> str | None:
    """What `folder` is if it is no Megatron checkpoint, and what to do: a sentence without its subject."""
    if is_model_folder(folder) and not is_adapter(folder):
        return (
            "is a Hugging Face model folder, not a Megatron checkpoint: convert it first, with python "
            "tools/checkpoint/util.py --loader mixtral_hf --saver mixtral "
            f"--load-dir {shlex.quote(str(folder))} --save-dir NEW_FOLDER"
        )
    return foreign_kind(folder)


def _snapshots(folder: Path) -> list[Path]:
    """The model folders in a download cache, or in one of its parts."""
    parts = ("snapshots/*", "models--*/snapshots/*", "hub/models--*/snapshots/*")
    inside = ("*",) if folder.name == "snapshots" else parts
    found = sorted(path for pattern in inside for path in folder.glob(pattern) if path.is_dir())
    # what a download that was broken off has left is not worth naming next to a model
    return [path for path in found if is_model_folder(path)] or found
