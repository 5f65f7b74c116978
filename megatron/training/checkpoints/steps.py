"""Which steps of a folder are complete, and the removal of those that are no longer wanted."""

import os
import re
import shutil
from pathlib import Path

from megatron.core import interchange
from megatron.training.checkpoints.formats import is_complete, is_saved_here


def newest_complete_step(root: Path) -> int | None:
    """The highest iteration of which everything is there, None if there is none."""
    steps = reversed(interchange.available_iterations(root))
    return next((step for step in steps if is_complete(interchange.checkpoint_dir(root, step))), None)


def remove_old_steps(root: Path, newest: int, keep_last: int | None, retain_interval: int | None) -> None:
    """Removes complete steps before `newest`, which was just saved, apart from those the two settings keep.

    Kept are the last `keep_last` complete steps (1 if only the other is given) and all multiples of
    `retain_interval`. Incomplete steps, and those of another program's format, are left alone and do not count.
    """
    if keep_last is None and retain_interval is None:
        return
    folders = {step: interchange.checkpoint_dir(root, step) for step in interchange.available_iterations(root)}
    complete = [
        step for step, folder in folders.items() if step <= newest and is_saved_here(folder) and is_complete(folder)
    ]
    for step in complete[: -(keep_last or 1)]:
        if retain_interval is None or step % retain_interval:
            folder = folders[step]
            hidden = folder.with_name(f".{folder.name}.removing")  # what is half removed must not look like a step
            shutil.rmtree(hidden, ignore_errors=True)
            os.rename(folder, hidden)
            shutil.rmtree(hidden)


def remove_leftovers(root: Path) -> None:
    """Removes what killed starts, saves and removals left behind; only while nothing is being saved to `root`.

    A step that was moved aside, and whose new copy never came, is put back.
    """
    for entry in list(root.iterdir()):
        step = re.fullmatch(r"\.(iter_[0-9]{7,})\.(saving|removing|previous)", entry.name)
        if step and step.group(2) == "previous" and not (root / step.group(1)).exists():
            os.rename(entry, root / step.group(1))
        elif step:
            shutil.rmtree(entry, ignore_errors=True)
        elif re.fullmatch(rf"\.({re.escape(interchange.TRACKER_FILE)}|save\.lock)\..*\.tmp|\.probe-[0-9]+", entry.name):
            entry.unlink(missing_ok=True)
