"""The checkpoint a run starts from: which one, how much of it is taken, and whether it is of the same model."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from megatron.core import interchange
from megatron.core.config import ModelConfig
from megatron.core.dist_checkpointing import CheckpointReader, is_distributed_checkpoint
from megatron.core.interchange.folder_kind import not_a_checkpoint
from megatron.core.parallel_state import ProcessGroups
from megatron.training.arguments import SHAPE_FIELDS
from megatron.training.checkpoint_steps import newest_complete_step
from megatron.training.config import Arguments, CheckpointConfig
from megatron.training.initialize import on_first

# Where the configuration derives a value from another field if it is not given.
_DERIVED = {"num_query_groups": "query_groups", "kv_channels": "head_dim"}


@dataclass(frozen=True)
class CheckpointSource:
    """The checkpoint a run starts from, and how much of it is taken."""

    folder: Path
    format: Literal["torch", "torch_dist"]
    weights_only: bool
    """Whether the run begins at iteration 0, rather than where the checkpoint was saved."""
    with_optimizer: bool
    with_rng: bool
    remark: str = ""


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint held beside tensors."""

    arguments: Any
    """Every setting of the run that saved it, as attributes."""
    progress: dict[str, Any]
    """How far that run had come."""


def locate_checkpoint(arguments: Arguments, groups: ProcessGroups) -> CheckpointSource | None:
    """What --load names, or None for freshly drawn weights; the first rank decides for all.

    Raises ValueError on every rank if there should be a checkpoint and is none.
    """
    settings = arguments.checkpoint
    return None if settings.load is None else on_first(lambda: _locate(Path(str(settings.load)), settings), groups)


def _locate(load: Path, settings: CheckpointConfig) -> CheckpointSource | None:
    same_folder = settings.save is not None and load.resolve() == Path(settings.save).resolve()
    warning = ""
    if same_folder and not (load / interchange.TRACKER_FILE).exists():
        step = newest_complete_step(load) if load.is_dir() else None
        if step is None:
            _refuse_lost_tracker(load)
            if settings.exit_on_missing_checkpoint:
                raise ValueError(f"there is no checkpoint in {load}, and --exit-on-missing-checkpoint asks for one")
            return None
        folder: Path = interchange.checkpoint_dir(load, step)
        warning = f"WARNING: {load} has no {interchange.TRACKER_FILE}; took its newest complete step"
    else:
        folder, _ = interchange.find_checkpoint(load)
    kind = checkpoint_format(folder)
    if folder.name == "release" or (settings.finetune and not same_folder):
        return CheckpointSource(folder, kind, weights_only=True, with_optimizer=False, with_rng=False)
    if not same_folder:
        return CheckpointSource(folder, kind, False, not settings.no_load_optim, not settings.no_load_rng)
    # A restart of the run itself: flags for the checkpoint it started from must not drop its state.
    if settings.finetune and not getattr(stored_arguments(folder), "finetune", False):
        raise ValueError(
            f"--finetune with --load equal to --save would overwrite the run in {load}: give another --save folder"
        )
    if settings.finetune or settings.no_load_optim or settings.no_load_rng:
        remark = "--finetune, --no-load-optim and --no-load-rng do not apply to the run's own checkpoints"
        warning = f"{warning}\n{remark}" if warning else remark
    return CheckpointSource(folder, kind, False, True, True, warning)


def _refuse_lost_tracker(root: Path) -> None:
    """Raises ValueError if something is there but no tracker: training from scratch would write over or beside it."""
    kind = not_a_checkpoint(root)
    if kind is not None:
        raise ValueError(f"{root} {kind}")
    if root.is_dir() and (interchange.available_iterations(root) or (root / "release").is_dir()):
        raise ValueError(
            f"{root} holds checkpoints but no {interchange.TRACKER_FILE}, and none of them is complete: write the step "
            "to load there, or use an empty folder"
        )


def checkpoint_format(folder: Path) -> Literal["torch", "torch_dist"]:
    """The format of a step, by what is in its folder. Raises ValueError if it is of neither."""
    if is_distributed_checkpoint(folder):
        return "torch_dist"
    if any(folder.glob("mp_rank_*")):
        return "torch"
    if (folder / ".metadata").exists() or any(folder.glob("*.distcp")):
        raise ValueError(
            f"{folder} is a torch_dist checkpoint of Megatron-LM, which holds pickled objects: convert it there with "
            "--ckpt-convert-format torch"
        )
    kind = not_a_checkpoint(folder) or "holds no checkpoint: neither mp_rank_* folders nor metadata.json"
    raise ValueError(f"{folder} {kind}")


def checkpoint_model(load: str) -> ModelConfig:
    """The model that the newest checkpoint in `load` holds. Raises ValueError if there is none that can be read."""
    try:
        folder, _ = interchange.find_checkpoint(Path(load))
    except FileNotFoundError as error:
        raise ValueError(f"--use-checkpoint-args: {error}") from error
    return interchange.model_config_from_args(stored_arguments(folder))


def stored_arguments(folder: Path) -> Any:
    """The settings of the run that saved a step. Raises ValueError if it has none."""
    if checkpoint_format(folder) == "torch_dist":
        with CheckpointReader(folder) as reader:
            return SimpleNamespace(**reader.arguments)
    files = sorted(folder.glob(f"*/{interchange.CHECKPOINT_FILE}"))
    if not files:
        raise ValueError(f"{folder} holds no {interchange.CHECKPOINT_FILE}")
    content = interchange.load_torch(files[0], mmap=True, verify=False)
    if "args" not in content:
        raise ValueError(f"{files[0]} has no 'args': give the model's shape by flags, without --use-checkpoint-args")
    return content["args"]


def check_same_model(path: Path, saved_arguments: Any, arguments: Arguments, tp_size: int | None = None) -> None:
    """Raises ValueError, listing the flags, if a checkpoint is of another model than the command line describes.

    The padded vocabulary is compared where `tp_size` is given.
    """
    window = getattr(saved_arguments, "sliding_window", None)
    if window is not None and window < arguments.data.seq_length:
        raise ValueError(
            f"{path}: the model attends to {window} tokens only, which is not supported for --seq-length "
            f"{arguments.data.seq_length}: use at most {window}"
        )
    saved = interchange.model_config_from_args(saved_arguments)
    differences = []
    for field in SHAPE_FIELDS:
        if field == "max_position_embeddings":  # nothing in the weights depends on it
            continue
        name = _DERIVED.get(field, field)
        theirs, ours = getattr(saved, name), getattr(arguments.model, name)
        if theirs is not None and theirs != ours:
            differences.append(f"--{field.replace('_', '-')} {theirs} there, {ours} here")
    if tp_size is not None:
        theirs, ours = getattr(saved_arguments, "padded_vocab_size", None), arguments.model.padded_vocab_size(tp_size)
        if theirs not in (None, ours):
            differences.append(f"vocabulary padded to {theirs} there, {ours} here (--make-vocab-size-divisible-by)")
    if differences:
        raise ValueError(
            f"{path} is a checkpoint of another model: {'; '.join(differences)}. Correct the flags or the "
            "tokenizer, or add --use-checkpoint-args"
        )


def check_same_type(source: CheckpointSource, saved_arguments: Any, arguments: Arguments) -> None:
    """Raises ValueError if the optimizer's state is of a run in another type of parameters than this one."""
    saved, ours = getattr(saved_arguments, "params_dtype", None), arguments.model.params_dtype
    if source.with_optimizer and saved is not None and str(saved).removeprefix("torch.") != ours:
        raise ValueError(
            f"{source.folder} was saved by a run in {saved}, and this one is in {ours} (--bf16, --fp16 or neither; "
            "PRECISION in the example script): take the same, or start from its weights alone with --no-load-optim or "
            "--finetune"
        )
