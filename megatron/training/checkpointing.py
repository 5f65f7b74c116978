"""Saving and resuming a run: one file for each rank of a model replica, at the same layout."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.core import interchange
from megatron.core.config import ModelConfig
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.optimizer.optimizer import MixedPrecisionAdamW
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import named_shards
from megatron.training.arguments import SHAPE_FIELDS
from megatron.training.config import Arguments
from megatron.training.initialize import together

# Where the configuration derives a value from another field if it is not given.
_DERIVED = {"num_query_groups": "query_groups", "kv_channels": "head_dim"}


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


def checkpoint_model(load: str) -> ModelConfig:
    """The model that the newest checkpoint in `load` holds. Raises ValueError if there is none that can be read."""
    try:
        folder, _ = interchange.find_checkpoint(Path(load))
    except FileNotFoundError as error:
        raise ValueError(f"--use-checkpoint-args: {error}") from error
    files = sorted(folder.glob(f"*/{interchange.CHECKPOINT_FILE}"))
    if not files:
        raise ValueError(f"{folder} holds no {interchange.CHECKPOINT_FILE}")
    content = interchange.load_torch(files[0], mmap=True, verify=False)
    if "args" not in content:
        raise ValueError(f"{files[0]} has no 'args': give the model's shape by flags, without --use-checkpoint-args")
    return interchange.model_config_from_args(content["args"])


def checkpoint_namespace(arguments: Arguments, progress: Progress, tp_size: int, pp_size: int) -> Any:
    """The `args` of a checkpoint: every setting of the run, as plain values."""
    extra: dict[str, Any] = {}
    for section in (
        arguments.optimizer, arguments.tokenizer, arguments.data, arguments.training, arguments.parallel,
    ):  # fmt: skip
        extra |= {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(section).items()}
    extra |= {"iteration": progress.iteration, "consumed_train_samples": progress.consumed_samples}
    return interchange.model_args_namespace(arguments.model, tp_size, pp_size, arguments.data.seq_length, extra)


def save_checkpoint(
    arguments: Arguments,
    groups: ProcessGroups,
    model: MixtralModel,
    optimizer: MixedPrecisionAdamW,
    progress: Progress,
) -> None:
    """Saves a step that is either whole or absent; collective. Raises ValueError on every rank if any rank fails."""
    assert arguments.checkpoint.save is not None
    root, iteration = Path(arguments.checkpoint.save), progress.iteration

    def write() -> None:
        if groups.dp_cp.rank != 0:
            return
        folder = interchange.begin_step(root, iteration)
        folder /= interchange.rank_dir_name(groups.tp.rank, groups.pp.rank, groups.pp.size)
        folder.mkdir(exist_ok=True)
        content: dict[str, Any] = {
            "args": checkpoint_namespace(arguments, progress, groups.tp.size, groups.pp.size),
            "checkpoint_version": interchange.CHECKPOINT_VERSION,
            "iteration": iteration,
            # clones, since a view of stacked experts would be saved with the whole stack
            "model": {
                shard.stage_name: shard.data.to("cpu", copy=True) for shard in named_shards(model, model.first_layer)
            },
            "opt_param_scheduler": asdict(progress),
            "rng_state": _rng_state(),
        }
        if not arguments.checkpoint.no_save_optim:
            content["optimizer"] = optimizer.state_dict()
        interchange.save_torch(folder / interchange.CHECKPOINT_FILE, content)

    def commit() -> None:
        if groups.world.is_first:
            interchange.commit_step(root, iteration, groups.tp.size, groups.pp.size)

    together(write, groups)
    together(commit, groups)


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_checkpoint(
    arguments: Arguments, groups: ProcessGroups, model: MixtralModel, optimizer: MixedPrecisionAdamW
) -> tuple[Progress, str]:
    """Loads what --load names, and says what was loaded; collective.

    Nothing is changed unless every rank's file fits. Raises ValueError on every rank otherwise.
    """
    settings = arguments.checkpoint
    if settings.load is None:
        return Progress(), "starting from freshly drawn weights"
    same_folder = settings.save is not None and Path(settings.load).resolve() == Path(settings.save).resolve()
    if same_folder and not (Path(settings.load) / interchange.TRACKER_FILE).exists():
        together(lambda: _refuse_lost_tracker(Path(str(settings.load))), groups)
        return Progress(), f"no checkpoint in {settings.load} yet: starting from freshly drawn weights"

    folder, step = together(lambda: interchange.find_checkpoint(Path(str(settings.load))), groups)
    weights_only = step == "release" or settings.finetune
    with_optimizer = not weights_only and not settings.no_load_optim
    remark = ""
    if same_folder and step != "release" and (settings.no_load_optim or settings.finetune or settings.no_load_rng):
        # a restart of the run itself: these flags were meant for the checkpoint it started from
        weights_only, with_optimizer = False, True
        remark = " (--no-load-optim, --no-load-rng and --finetune do not apply to the run's own checkpoints)"
    content = together(lambda: _read(folder, arguments, groups, model, with_optimizer), groups)

    shards = {shard.stage_name: shard for shard in named_shards(model, model.first_layer)}
    for name, shard in shards.items():
        shard.data.copy_(content["model"][name])
    if with_optimizer:
        together(lambda: optimizer.load_state_dict(content["optimizer"]), groups)
    else:
        optimizer.reload_masters()
    if weights_only:
        return Progress(), f"loaded the weights of {folder}; optimizer, schedule and data start anew"
    if remark or not settings.no_load_rng:
        torch.set_rng_state(content["rng_state"]["cpu"])
        if torch.cuda.is_available() and "cuda" in content["rng_state"]:
            torch.cuda.set_rng_state(content["rng_state"]["cuda"])
    progress = Progress(**content["opt_param_scheduler"])
    what = "weights, optimizer, schedule and data position" if with_optimizer else "weights, schedule and data position"
    return progress, f"resumed at iteration {progress.iteration} from {folder}: {what}{remark}"


def _refuse_lost_tracker(root: Path) -> None:
    """Raises ValueError if there are steps but no tracker: training from scratch would overwrite them."""
    if root.is_dir() and (interchange.available_iterations(root) or (root / "release").is_dir()):
        raise ValueError(
            f"{root} holds checkpoints but no {interchange.TRACKER_FILE}: write the step to load there, or use an "
            "empty folder"
        )


def _read(
    folder: Path, arguments: Arguments, groups: ProcessGroups, model: MixtralModel, with_optimizer: bool
) -> dict[str, Any]:
    """This rank's file, once it is certain that it fits."""
    layout = interchange.available_layout(folder)
    if layout != (groups.tp.size, groups.pp.size):
        raise ValueError(
            f"{folder} was saved at tensor-parallel size {layout[0]} and pipeline-parallel size {layout[1]}, but this "
            f"run has {groups.tp.size} and {groups.pp.size}: convert it with tools/checkpoint/util.py --loader mixtral "
            "--saver mixtral, or use its layout"
        )
    name = interchange.rank_dir_name(groups.tp.rank, groups.pp.rank, groups.pp.size)
    path = folder / name / interchange.CHECKPOINT_FILE
    content = interchange.load_torch(path, mmap=True)
    if "model" not in content:
        raise ValueError(f"{path} holds no 'model'")
    _check_model(path, content, arguments)
    _check_tensors(path, content["model"], model)
    if with_optimizer and "optimizer" not in content:
        raise ValueError(f"{path} holds no optimizer state: add --finetune to start a new run from its weights")
    return content


def _check_model(path: Path, content: dict[str, Any], arguments: Arguments) -> None:
    """Raises ValueError, listing the flags, if the checkpoint is of another model than the command line describes."""
    if "args" not in content:
        return
    window = getattr(content["args"], "sliding_window", None)
    if window is not None and window < arguments.data.seq_length:
        raise ValueError(
            f"{path}: the model attends to {window} tokens only, which is not supported for --seq-length "
            f"{arguments.data.seq_length}: use at most {window}"
        )
    saved = interchange.model_config_from_args(content["args"])
    differences = []
    for field in SHAPE_FIELDS:
        if field == "max_position_embeddings":  # nothing in the weights depends on it
            continue
        name = _DERIVED.get(field, field)
        theirs, ours = getattr(saved, name), getattr(arguments.model, name)
        if theirs is not None and theirs != ours:
            differences.append(f"--{field.replace('_', '-')} {theirs} there, {ours} here")
    if differences:
        raise ValueError(
            f"{path} is a checkpoint of another model: {'; '.join(differences)}. Correct the flags, or add "
            "--use-checkpoint-args"
        )


def _check_tensors(path: Path, tensors: dict[str, Any], model: MixtralModel) -> None:
    """Raises ValueError, listing names, if a tensor is missing, unexpected or of another shape."""
    shards = {shard.stage_name: shard for shard in named_shards(model, model.first_layer)}
    found = {name for name in tensors if not name.endswith("_extra_state")}
    problems = [f"{name} is missing" for name in sorted(shards.keys() - found)]
    problems += [f"{name} is unexpected" for name in sorted(found - shards.keys())]
    for name in sorted(shards.keys() & found):
        if tensors[name].shape != shards[name].data.shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(shards[name].data.shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")
