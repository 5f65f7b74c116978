"""Saving and resuming a run: one file for each rank of a model replica, at the same layout."""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from megatron.core import interchange
from megatron.core.config import ModelConfig
from megatron.core.models.mixtral.mixtral_model import ModelChunks
from megatron.core.optimizer.optimizer import MixedPrecisionAdamW
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import named_shards
from megatron.training.arguments import SHAPE_FIELDS
from megatron.training.config import Arguments, CheckpointConfig
from megatron.training.initialize import SharedError, on_first, together

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
    schedule: dict[str, Any] = field(default_factory=dict)
    """Settings of learning rate and weight decay over the run, which a resumed run must share."""
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    """What is in the files that are trained on, so that a resumed run notices if they were replaced."""


def checkpoint_model(load: str) -> ModelConfig:
    """The model that the newest checkpoint in `load` holds. Raises ValueError if there is none that can be read."""
    try:
        folder, _ = interchange.find_checkpoint(Path(load))
    except FileNotFoundError as error:
        raise ValueError(f"--use-checkpoint-args: {error}") from error
    return interchange.model_config_from_args(_stored_args(folder))


def _stored_args(folder: Path) -> Any:
    """The `args` in a step's first file. Raises ValueError if it has none."""
    files = sorted(folder.glob(f"*/{interchange.CHECKPOINT_FILE}"))
    if not files:
        raise ValueError(f"{folder} holds no {interchange.CHECKPOINT_FILE}")
    content = interchange.load_torch(files[0], mmap=True, verify=False)
    if "args" not in content:
        raise ValueError(f"{files[0]} has no 'args': give the model's shape by flags, without --use-checkpoint-args")
    return content["args"]


def interchange_layout(arguments: Arguments) -> interchange.Layout:
    """The run's parallel sizes as checkpoint folders know them. Raises ValueError if they cannot express it."""
    parallel = arguments.parallel
    return interchange.Layout(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel,
    )


def checkpoint_namespace(arguments: Arguments, progress: Progress, layout: interchange.Layout) -> Any:
    """The `args` of a checkpoint: every setting of the run, as plain values."""
    extra: dict[str, Any] = {}
    for section in (
        arguments.optimizer, arguments.tokenizer, arguments.data, arguments.training, arguments.parallel,
        arguments.checkpoint,
    ):  # fmt: skip
        extra |= {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(section).items()}
    chunks = len(arguments.parallel.stages(arguments.model.num_layers)[0])
    extra["virtual_pipeline_model_parallel_size"] = chunks if chunks > 1 else None
    extra |= {"iteration": progress.iteration, "consumed_train_samples": progress.consumed_samples}
    return interchange.model_args_namespace(arguments.model, layout, arguments.data.seq_length, extra)


def save_checkpoint(
    arguments: Arguments,
    groups: ProcessGroups,
    model: ModelChunks,
    optimizer: MixedPrecisionAdamW,
    progress: Progress,
) -> None:
    """Saves a step that is either whole or absent; collective. Raises ValueError on every rank if any rank fails."""
    assert arguments.checkpoint.save is not None
    root, iteration = Path(arguments.checkpoint.save), progress.iteration
    # brought together before any rank can fail on its own
    state = {} if arguments.checkpoint.no_save_optim else optimizer.state_dict(keep=groups.dp_cp.rank == 0)

    layout = interchange_layout(arguments)
    rank_in_stage = groups.world.rank % (groups.world.size // layout.pipeline)

    def write() -> None:
        if rank_in_stage >= layout.writers_per_stage:
            return
        folder = interchange.begin_step(root, iteration)
        folder /= layout.folder(groups.tp.rank, groups.pp.rank, groups.ep.rank)
        folder.mkdir(exist_ok=True)
        content: dict[str, Any] = {
            "args": checkpoint_namespace(arguments, progress, layout),
            "checkpoint_version": interchange.CHECKPOINT_VERSION,
            "iteration": iteration,
            "opt_param_scheduler": asdict(progress),
            "rng_state": _rng_state(),
        }
        for key, chunk in model.checkpoint_keys():
            # clones, since a view of stacked experts would be saved with the whole stack
            content[key] = {
                shard.stage_name: shard.data.to("cpu", copy=True) for shard in named_shards(chunk, chunk.first_layer)
            }
        if not arguments.checkpoint.no_save_optim:
            content["optimizer"] = state
        interchange.save_torch(folder / interchange.CHECKPOINT_FILE, content)

    def commit() -> None:
        if groups.world.is_first:
            interchange.commit_step(root, iteration, layout)

    try:
        together(write, groups)
        together(commit, groups)
    except SharedError:
        if groups.world.is_first:
            interchange.abandon_step(root, iteration)
        raise


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


@dataclass(frozen=True)
class CheckpointSource:
    """The checkpoint a run starts from, and how much of it is taken."""

    folder: Path
    weights_only: bool
    """Whether the run begins at iteration 0, rather than where the checkpoint was saved."""
    with_optimizer: bool
    with_rng: bool
    remark: str = ""


def locate_checkpoint(arguments: Arguments, groups: ProcessGroups) -> CheckpointSource | None:
    """What --load names, or None for freshly drawn weights; the first rank decides for all.

    Raises ValueError on every rank if there should be a checkpoint and is none.
    """
    settings = arguments.checkpoint
    return None if settings.load is None else on_first(lambda: _locate(Path(str(settings.load)), settings), groups)


def _locate(load: Path, settings: CheckpointConfig) -> CheckpointSource | None:
    same_folder = settings.save is not None and load.resolve() == Path(settings.save).resolve()
    if same_folder and not (load / interchange.TRACKER_FILE).exists():
        _refuse_lost_tracker(load)
        if settings.exit_on_missing_checkpoint:
            raise ValueError(f"there is no checkpoint in {load}, and --exit-on-missing-checkpoint asks for one")
        return None
    folder, step = interchange.find_checkpoint(load)
    if step == "release" or (settings.finetune and not same_folder):
        return CheckpointSource(folder, weights_only=True, with_optimizer=False, with_rng=False)
    if not same_folder:
        return CheckpointSource(folder, False, not settings.no_load_optim, not settings.no_load_rng)
    # A restart of the run itself: flags for the checkpoint it started from must not drop its state.
    if settings.finetune and not getattr(_stored_args(folder), "finetune", False):
        raise ValueError(
            f"--finetune with --load equal to --save would overwrite the run in {load}: give another --save folder"
        )
    ignored = settings.finetune or settings.no_load_optim or settings.no_load_rng
    remark = "--finetune, --no-load-optim and --no-load-rng do not apply to the run's own checkpoints"
    return CheckpointSource(folder, False, True, True, remark if ignored else "")


def load_checkpoint(
    source: CheckpointSource | None,
    arguments: Arguments,
    groups: ProcessGroups,
    model: ModelChunks,
    optimizer: MixedPrecisionAdamW,
) -> tuple[Progress, str]:
    """Loads what `locate_checkpoint` found, and says what was loaded; collective.

    Nothing is changed unless every rank's file fits. Raises ValueError on every rank otherwise.
    """
    if source is None:
        load = arguments.checkpoint.load
        return Progress(), (f"no checkpoint in {load} yet: " if load else "") + "starting from freshly drawn weights"
    content = together(lambda: _read(source, arguments, groups, model, optimizer), groups)
    for key, chunk in model.checkpoint_keys():
        for shard in named_shards(chunk, chunk.first_layer):
            shard.data.copy_(content[key][shard.stage_name])
    if source.with_optimizer:
        optimizer.load_state_dict(content["optimizer"])
    else:
        optimizer.reload_masters()
    if source.weights_only:
        return Progress(), f"loaded the weights of {source.folder}; optimizer, schedule and data start anew"
    if source.with_rng:
        torch.set_rng_state(content["rng_state"]["cpu"])
        if torch.cuda.is_available() and "cuda" in content["rng_state"]:
            torch.cuda.set_rng_state(content["rng_state"]["cuda"])
    progress = Progress(**content["opt_param_scheduler"])
    what = "weights, optimizer, schedule and data position"
    if not source.with_optimizer:
        what = "weights, schedule and data position; the optimizer starts anew"
    lines = [f"resumed at iteration {progress.iteration} from {source.folder}: {what}", source.remark]
    lines.append(_changed_settings(content["args"], arguments))
    return progress, "\n".join(line for line in lines if line)


def _changed_settings(saved: Any, arguments: Arguments) -> str:
    """A remark if the resumed run reads other data, or reads them in another order, than before."""
    now = vars(checkpoint_namespace(arguments, Progress(), interchange.Layout()))
    names = (
        "params_dtype", "seed", "data_path", "data_args_path", "per_split_data_args_path", "train_data_path", "split",
        "mock_data", "seq_length",
    )  # fmt: skip
    changed = [
        f"--{name.replace('_', '-')} was {getattr(saved, name)}, is {now[name]}"
        for name in names
        if hasattr(saved, name) and getattr(saved, name) != now[name]
    ]
    return f"WARNING: changed since the checkpoint was saved: {'; '.join(changed)}" if changed else ""


def _refuse_lost_tracker(root: Path) -> None:
    """Raises ValueError if there are steps but no tracker: training from scratch would overwrite them."""
    if root.is_dir() and (interchange.available_iterations(root) or (root / "release").is_dir()):
        raise ValueError(
            f"{root} holds checkpoints but no {interchange.TRACKER_FILE}: write the step to load there, or use an "
            "empty folder"
        )


def _read(
    source: CheckpointSource,
    arguments: Arguments,
    groups: ProcessGroups,
    model: ModelChunks,
    optimizer: MixedPrecisionAdamW,
) -> dict[str, Any]:
    """This rank's file, once it is certain that it fits."""
    layout, ours = interchange.available_layout(source.folder), interchange_layout(arguments)
    if str(layout) != str(ours):
        raise ValueError(
            f"{source.folder} was saved at {layout}, but this run has {ours}: use its layout, or convert its weights "
            "(a new run then starts from them) with tools/checkpoint/util.py --loader mixtral --saver mixtral"
        )
    path = source.folder / layout.folder(groups.tp.rank, groups.pp.rank, groups.ep.rank) / interchange.CHECKPOINT_FILE
    content = interchange.load_torch(path, mmap=True)
    keys = [key for key, _ in model.checkpoint_keys()]
    found = [key for key in content if re.fullmatch("model[0-9]*", key)]
    if sorted(found) != sorted(keys):
        raise ValueError(
            f"{path} holds {', '.join(found) or 'no model'}, but this run needs {', '.join(keys)}: use the virtual "
            "pipeline stages it was saved with"
        )
    _check_model(path, content, arguments, groups.tp.size)
    _check_tensors(path, content, model)
    if source.weights_only:
        return content
    progress = content.get("opt_param_scheduler")
    if not isinstance(progress, dict) or set(progress) != {field.name for field in fields(Progress)}:
        raise ValueError(f"{path} was not saved by this program: add --finetune to start a new run from its weights")
    if source.with_optimizer:
        if "optimizer" not in content:
            raise ValueError(f"{path} holds no optimizer state: add --finetune to start a new run from its weights")
        optimizer.check_state_dict(content["optimizer"])
    return content


def _check_model(path: Path, content: dict[str, Any], arguments: Arguments, tp_size: int) -> None:
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
    for setting in SHAPE_FIELDS:
        if setting == "max_position_embeddings":  # nothing in the weights depends on it
            continue
        name = _DERIVED.get(setting, setting)
        theirs, ours = getattr(saved, name), getattr(arguments.model, name)
        if theirs is not None and theirs != ours:
            differences.append(f"--{setting.replace('_', '-')} {theirs} there, {ours} here")
    theirs, ours = getattr(content["args"], "padded_vocab_size", None), arguments.model.padded_vocab_size(tp_size)
    if theirs not in (None, ours):
        differences.append(f"vocabulary padded to {theirs} there, {ours} here (--make-vocab-size-divisible-by)")
    if differences:
        raise ValueError(
            f"{path} is a checkpoint of another model: {'; '.join(differences)}. Correct the flags or the "
            "tokenizer, or add --use-checkpoint-args"
        )


def _check_tensors(path: Path, content: dict[str, Any], model: ModelChunks) -> None:
    """Raises ValueError, listing names, if a tensor is missing, unexpected or of another shape."""
    keys = model.checkpoint_keys()
    shards = {
        f"{key}/{shard.stage_name}": shard for key, chunk in keys for shard in named_shards(chunk, chunk.first_layer)
    }
    tensors = {f"{key}/{name}": tensor for key, _ in keys for name, tensor in content[key].items()}
    found = {name for name in tensors if not name.endswith("_extra_state")}
    problems = [f"{name} is missing" for name in sorted(shards.keys() - found)]
    problems += [f"{name} is unexpected" for name in sorted(found - shards.keys())]
    for name in sorted(shards.keys() & found):
        if tensors[name].shape != shards[name].data.shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(shards[name].data.shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")
