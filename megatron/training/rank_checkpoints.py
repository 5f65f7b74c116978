"""Checkpoints of one file for each rank of a model replica (`--ckpt-format torch`), resumed at the same layout."""

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron.core import interchange
from megatron.core.models.common import ModelChunks
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import named_shards
from megatron.training.checkpoint_source import CheckpointSource, LoadedState, check_same_model, check_same_type
from megatron.training.config import Arguments
from megatron.training.initialize import together
from megatron.training.progress import Progress


def interchange_layout(arguments: Arguments) -> interchange.Layout:
    """The run's parallel sizes as this format's folders know them. Raises ValueError if they cannot express it."""
    parallel = arguments.parallel
    return interchange.Layout(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel,
    )


def rank_file_writer(
    folder: Path,
    arguments: Arguments,
    groups: ProcessGroups,
    model: ModelChunks,
    optimizer: MixedPrecisionOptimizer,
    progress: Progress,
    namespace: Any,
) -> Callable[[], None]:
    """What writes this rank's file, if it has one, to the folder of a step; collective, but the call itself is not."""
    layout = interchange_layout(arguments)
    writes = groups.world.rank % (groups.world.size // layout.pipeline) < layout.writers_per_stage
    # brought together before any rank can fail on its own
    state = {} if arguments.checkpoint.no_save_optim else optimizer.state_dict(keep=writes)

    def write() -> None:
        if not writes:
            return
        own = folder / layout.folder(groups.tp.rank, groups.pp.rank, groups.ep.rank)
        own.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "args": namespace,
            "checkpoint_version": interchange.CHECKPOINT_VERSION,
            "iteration": progress.iteration,
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
        interchange.save_torch(own / interchange.CHECKPOINT_FILE, content)

    return write


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # a run on a CPU takes no memory of a GPU that is there
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_rank_file(
    source: CheckpointSource,
    arguments: Arguments,
    groups: ProcessGroups,
    model: ModelChunks,
    optimizer: MixedPrecisionOptimizer,
) -> LoadedState:
    """Loads this rank's file as far as `source` says; collective.

    Nothing is changed unless every rank's file fits. Raises SharedError on every rank otherwise.
    """
    content = together(lambda: _read(source, arguments, groups, model, optimizer), groups)
    for key, chunk in model.checkpoint_keys():
        for shard in named_shards(chunk, chunk.first_layer):
            shard.data.copy_(content[key][shard.stage_name])
    if source.with_optimizer:
        optimizer.load_state_dict(content["optimizer"])
    else:
        optimizer.reload_masters()
    if source.with_rng:
        torch.set_rng_state(content["rng_state"]["cpu"])
        if torch.cuda.is_initialized() and "cuda" in content["rng_state"]:
            torch.cuda.set_rng_state(content["rng_state"]["cuda"])
    return LoadedState(content.get("args", SimpleNamespace()), content.get("opt_param_scheduler", {}))


def _read(
    source: CheckpointSource,
    arguments: Arguments,
    groups: ProcessGroups,
    model: ModelChunks,
    optimizer: MixedPrecisionOptimizer,
) -> dict[str, Any]:
    """This rank's file, once it is certain that it fits."""
    layout, ours = interchange.available_layout(source.folder), interchange_layout(arguments)
    if str(layout) != str(ours):
        raise ValueError(
            f"{source.folder} was saved at {layout}, but this run has {ours}: use its layout, or convert its weights "
            "(a new run then starts from them) with tools/checkpoint/util.py --loader mixtral --saver mixtral; "
            "checkpoints saved with --ckpt-format torch_dist load at any layout"
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
    if "args" in content:
        check_same_model(path, content["args"], arguments, groups.tp.size)
    _check_tensors(path, content, model)
    if source.weights_only:
        return content
    progress = content.get("opt_param_scheduler")
    if not isinstance(progress, dict) or set(progress) != {field.name for field in fields(Progress)}:
        raise ValueError(f"{path} was not saved by this program: add --finetune to start a new run from its weights")
    if source.with_optimizer:
        if "optimizer" not in content:
            raise ValueError(f"{path} holds no optimizer state: add --finetune to start a new run from its weights")
        check_same_type(source, content.get("args"), arguments)
        optimizer.check_state_dict(content["optimizer"])
    return content


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
