"""What a run does at its start with the places it will write to: checks, the lock, and what a killed run left."""

import glob
import time
from pathlib import Path

from megatron.core.atomic_files import remove_unfinished
from megatron.core.parallel_state import ProcessGroups
from megatron.training.checkpoints.folder_lock import FolderLock
from megatron.training.checkpoints.formats import SAVED_FORMATS
from megatron.training.checkpoints.steps import remove_leftovers
from megatron.training.config import Arguments, LoggingConfig
from megatron.training.ending import Ending
from megatron.training.initialize import on_first, print_once, together


def open_save_folder(arguments: Arguments, groups: ProcessGroups, ending: Ending) -> FolderLock | None:
    """Locks --save for this job, on the first rank, and removes what killed runs left there; collective.

    Raises ValueError before the first step if checkpoints could not be written, or not by all machines, or if another
    job is writing there.
    """
    if arguments.checkpoint.save is None or arguments.training.skip_train:
        return None
    folder = Path(arguments.checkpoint.save)
    lock = FolderLock(folder) if groups.world.is_first else None

    def write() -> str:
        SAVED_FORMATS[arguments.checkpoint.ckpt_format].check_layout(arguments)
        folder.mkdir(parents=True, exist_ok=True)
        assert lock is not None
        ending.before.append(lock.release)
        lock.acquire(lambda text: print_once(groups, text))
        remove_leftovers(folder)
        probe = folder / f".probe-{time.time_ns()}"
        probe.touch()
        return probe.name

    def see() -> None:
        if not (folder / name).exists():
            raise ValueError(f"--save {folder} is not the same folder on all machines: give one that they share")

    try:
        name = on_first(write, groups)
        together(see, groups)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    if lock is not None:
        (folder / name).unlink()
    return lock


def check_log_files(config: LoggingConfig) -> None:
    """Raises OSError before the first step if what is logged could not be written."""
    if config.metrics_path is not None:
        path = Path(config.metrics_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent, glob.escape(path.name))
        path.open("a").close()
    if config.tensorboard_dir is not None:
        Path(config.tensorboard_dir).mkdir(parents=True, exist_ok=True)
