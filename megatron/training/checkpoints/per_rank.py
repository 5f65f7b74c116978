"""The per-rank format (`--ckpt-format torch`): a file for each rank of a model replica, resumed at the same layout."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core import interchange
from megatron.core.interchange.folder_kind import is_per_rank
from megatron.core.models.common import ModelChunks
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.tensor_parallel.parameter import named_shards
from megatron.training.checkpoints.protocol import CheckpointSource, LoadedState, PreparedStep, StepToSave
from megatron.training.checkpoints.random_states import random_states, set_random_states
from megatron.training.checkpoints.same_model import check_same_model, check_same_type, refuse
from megatron.training.config import Arguments
from megatron.training.initialize import together
from megatron.training.progress import Progress, RunRecord, to_saved
from megatron.training.setup import Trainer


def layout_of(arguments: Arguments) -> interchange.Layout:
    """The run's parallel sizes as this format's folders know them. Raises ValueError if they cannot express it."""
    parallel = arguments.parallel
    return interchange.Layout(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel,
    )


class PerRank:
    """Steps of one file a rank, in Megatron's folders; its methods are those of CheckpointFormat."""

    is_mine = staticmethod(is_per_rank)

    def is_complete(self, folder: Path) -> bool:
        """Whether every rank's file is there."""
        return bool(interchange.available_layout(folder))

    def arguments(self, folder: Path) -> Any:
        """Those in the first rank's file."""
        files = sorted(folder.glob(f"*/{interchange.CHECKPOINT_FILE}"))
        if not files:
            raise ValueError(f"{folder} holds no {interchange.CHECKPOINT_FILE}")
        content = interchange.load_torch(files[0], mmap=True, verify=False)
        if "args" not in content:
            raise ValueError(
                f"{files[0]} has no 'args': give the model's shape by flags, without --use-checkpoint-args"
            )
        return content["args"]

    def check_layout(self, arguments: Arguments) -> None:
        """Raises ValueError if two ranks with different weights would share a file's name."""
        layout_of(arguments)

    def prepare(self, step: StepToSave) -> PreparedStep:
        """This rank's file, if it has one; the state may not change before it is written."""
        groups, layout = step.trainer.groups, layout_of(step.trainer.arguments)
        writes = groups.world.rank % (groups.world.size // layout.pipeline) < layout.writers_per_stage
        # brought together before any rank can fail on its own
        state = step.optimizer.state_dict(keep=writes) if step.optimizer is not None else None

        def write() -> None:
            if not writes:
                return
            own = step.folder / layout.folder(groups.tp.rank, groups.pp.rank, groups.ep.rank)
            own.mkdir(parents=True, exist_ok=True)
            content: dict[str, Any] = {
                "args": step.namespace,
                "checkpoint_version": interchange.CHECKPOINT_VERSION,
                "iteration": step.progress.iteration,
                "opt_param_scheduler": to_saved(step.progress, step.record),
                "rng_state": random_states(),
            }
            for key, chunk in step.trainer.model.checkpoint_keys():
                # clones, since a view of stacked experts would be saved with the whole stack
                content[key] = {
                    shard.stage_name: shard.data.to("cpu", copy=True)
                    for shard in named_shards(chunk, chunk.first_layer)
                }
            if state is not None:
                content["optimizer"] = state
            interchange.save_torch(own / interchange.CHECKPOINT_FILE, content)

        return PreparedStep(write, lambda _: interchange.commit_step(step.root, step.progress.iteration, layout))

    def rehearse(self, optimizer: MixedPrecisionOptimizer) -> None:
        """Brings the shards of the state together, as saving does."""
        optimizer.state_dict(keep=False)

    def load(self, source: CheckpointSource, trainer: Trainer) -> LoadedState:
        """Every rank reads the one file that has its part of the model."""
        content = together(lambda: _read(source, trainer), trainer.groups)
        for key, chunk in trainer.model.checkpoint_keys():
            for shard in named_shards(chunk, chunk.first_layer):
                shard.data.copy_(content[key][shard.stage_name])
        if source.with_optimizer:
            trainer.optimizer.load_state_dict(content["optimizer"])
        else:
            trainer.optimizer.reload_masters()
        if source.with_rng:
            set_random_states(content["rng_state"])
        return LoadedState(content.get("args", SimpleNamespace()), content.get("opt_param_scheduler", {}))


def _read(source: CheckpointSource, trainer: Trainer) -> dict[str, Any]:
    """This rank's file, once it is certain that it fits."""
    arguments, groups, model = trainer.arguments, trainer.groups, trainer.model
    layout, ours = interchange.available_layout(source.folder), layout_of(arguments)
    if str(layout) != str(ours):
        raise ValueError(
            f"{source.folder} was saved at {layout}, but this run has {ours}: use its layout, or convert its weights "
            "(a new run then starts from them) with tools/checkpoint/util.py --loader mixtral --saver mixtral; "
            "checkpoints saved with --ckpt-format sharded load at any layout"
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
    if not isinstance(progress, dict) or progress.keys() != to_saved(Progress(), RunRecord()).keys():
        raise ValueError(f"{path} was not saved by this program: add --finetune to start a new run from its weights")
    if source.with_optimizer:
        if "optimizer" not in content:
            raise ValueError(f"{path} holds no optimizer state: add --finetune to start a new run from its weights")
        check_same_type(source, content.get("args"), arguments)
        trainer.optimizer.check_state_dict(content["optimizer"])
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
    refuse(path, problems)
