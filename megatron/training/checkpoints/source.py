"""The checkpoint a run starts from: which one, how much of it is taken, and what is said of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import interchange
from megatron.core.config import ModelConfig
from megatron.core.interchange.folder_kind import not_a_checkpoint
from megatron.core.parallel_state import ProcessGroups
from megatron.training.changed_settings import changed_settings
from megatron.training.checkpoints.formats import format_of
from megatron.training.checkpoints.protocol import CheckpointSource, LoadedState
from megatron.training.checkpoints.steps import newest_complete_step
from megatron.training.config import Arguments, CheckpointConfig
from megatron.training.initialize import on_first
from megatron.training.progress import Progress, RunRecord, from_saved
from megatron.training.setup import Trainer


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
    found = format_of(folder)
    if folder.name == "release" or (settings.finetune and not same_folder):
        return CheckpointSource(folder, found, weights_only=True, with_optimizer=False, with_rng=False)
    if not same_folder:
        return CheckpointSource(folder, found, False, not settings.no_load_optim, not settings.no_load_rng)
    # A restart of the run itself: flags for the checkpoint it started from must not drop its state.
    if settings.finetune and not getattr(found.arguments(folder), "finetune", False):
        raise ValueError(
            f"--finetune with --load equal to --save would overwrite the run in {load}: give another --save folder"
        )
    if settings.finetune or settings.no_load_optim or settings.no_load_rng:
        remark = "--finetune, --no-load-optim and --no-load-rng do not apply to the run's own checkpoints"
        warning = f"{warning}\n{remark}" if warning else remark
    return CheckpointSource(folder, found, False, True, True, warning)


def _refuse_lost_tracker(root: Path) -> None:
    """Raises ValueError if something is there but no tracker: training from scratch would write over or next to it."""
    kind = not_a_checkpoint(root)
    if kind is not None:
        raise ValueError(f"{root} {kind}")
    if root.is_dir() and (interchange.available_iterations(root) or (root / "release").is_dir()):
        raise ValueError(
            f"{root} holds checkpoints but no {interchange.TRACKER_FILE}, and none of them is complete: write the step "
            "to load there, or use an empty folder"
        )


def checkpoint_model(load: str) -> ModelConfig:
    """The model that the newest checkpoint in `load` holds. Raises ValueError if there is none that can be read."""
    try:
        folder, _ = interchange.find_checkpoint(Path(load))
    except FileNotFoundError as error:
        raise ValueError(f"--use-checkpoint-args: {error}") from error
    return interchange.model_config_from_args(format_of(folder).arguments(folder))


def _converted(saved: Any, arguments: Arguments) -> str:
    """What of the optimizer's state is kept in another type than by the run that saved it; empty if nothing is."""
    kinds = {"masters": "main_params_dtype", "first moments": "exp_avg_dtype", "second moments": "exp_avg_sq_dtype"}
    now = arguments.optimizer
    changes = [
        f"{what} from {getattr(saved, name, 'fp32')} to {getattr(now, name)}"
        for what, name in kinds.items()
        if getattr(saved, name, "fp32") != getattr(now, name)
    ]
    return f"converted: {', '.join(changes)}" if changes else ""


def load_checkpoint(source: CheckpointSource | None, trainer: Trainer) -> tuple[Progress, RunRecord, str]:
    """Loads what `locate_checkpoint` found, and says what was loaded and what was not; collective.

    Nothing is changed unless all of it fits. Raises SharedError on every rank otherwise.
    """
    if source is None:
        load = trainer.arguments.checkpoint.load
        where = f"no checkpoint in {load} yet: " if load else ""
        return Progress(), RunRecord(), f"{where}starting from freshly drawn weights"
    loaded = source.format.load(source, trainer)
    if source.weights_only:
        remark = f"loaded the weights of {source.folder}; optimizer, schedule and data start from scratch"
        return Progress(), RunRecord(), remark
    progress, record = from_saved(loaded.progress)
    lines = [f"resumed at iteration {progress.iteration} from {source.folder}: {_taken(source, loaded)}", source.remark]
    if source.with_optimizer:
        lines.append(_converted(loaded.arguments, trainer.arguments))
    changed = changed_settings(vars(loaded.arguments), asdict(trainer.arguments))
    if changed:
        lines.append(f"WARNING: changed since the checkpoint was saved: {'; '.join(changed)}")
    return progress, record, "\n".join(line for line in lines if line)


def _taken(source: CheckpointSource, loaded: LoadedState) -> str:
    """What was loaded and what was not."""
    if loaded.remark:
        return loaded.remark
    taken = ["weights", "schedule and data position"]
    left: list[str] = []
    (taken if source.with_optimizer else left).insert(1, "optimizer (masters and moments)")
    (taken if source.with_rng else left).append("random state")
    not_taken = f"\nnot loaded, as asked for: {', '.join(left)}" if left else ""
    return f"loaded {', '.join(taken)}{not_taken}"
