"""Names of checkpoint folders, the tracker file, and the atomic replacement of a whole step.

A step is written to a hidden folder beside its place, moved there when all ranks are done, and only then named by the
tracker. An older copy of the same step is moved aside first and removed last; between the two moves, and after a kill
there, the older copy is what `find_checkpoint` gives.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Literal

from megatron.core.atomic_files import atomic_writer, sync_folder

TRACKER_FILE = "latest_checkpointed_iteration.txt"
CHECKPOINT_FILE = "model_optim_rng.pt"
CHECKPOINT_VERSION = 3.0
Step = int | Literal["release"]


def step_name(iteration: Step) -> str:
    """Name of a step's folder: `release` or `iter_0000100`."""
    return "release" if iteration == "release" else f"iter_{iteration:07d}"


def checkpoint_dir(root: Path, iteration: Step) -> Path:
    """Where a step belongs, whether it is there or not."""
    return Path(root) / step_name(iteration)


def rank_dir_name(tp_rank: int, pp_rank: int, pp_size: int, ep_rank: int = 0, ep_size: int = 1) -> str:
    """Folder of one rank in a step: `mp_rank_TT`, then `_PPP` only if there are stages, `_EEE` only if EP > 1."""
    name = f"mp_rank_{tp_rank:02d}"
    if pp_size > 1:
        name += f"_{pp_rank:03d}"
    if ep_size > 1:
        name += f"_{ep_rank:03d}"
    return name


def read_tracker(root: Path) -> Step | None:
    """The step the tracker names, None if there is no tracker. Raises ValueError naming the file if it is garbage."""
    path = Path(root) / TRACKER_FILE
    if not path.is_file():
        return None
    text = path.read_bytes()[:100].decode("ascii", "replace").strip()
    if text == "release":
        return "release"
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"{path} must hold an iteration or 'release', got {text!r}: write the newest step there")
    return int(text)


def write_tracker(root: Path, iteration: Step) -> None:
    """Names `iteration` as the newest step, atomically."""
    with atomic_writer(Path(root) / TRACKER_FILE) as file:
        file.write(str(iteration).encode("ascii"))


def _aside(root: Path, iteration: Step, what: str) -> Path:
    return Path(root) / f".{step_name(iteration)}.{what}"


def begin_step(root: Path, iteration: Step) -> Path:
    """The hidden folder to write a step into: the same path on every rank, made if need be."""
    folder = _aside(root, iteration, "saving")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def abandon_step(root: Path, iteration: Step) -> None:
    """Removes what was written since `begin_step`."""
    shutil.rmtree(_aside(root, iteration, "saving"), ignore_errors=True)


def commit_step(root: Path, iteration: Step, tensor_parallel_size: int, pipeline_parallel_size: int) -> Path:
    """Puts the step written since `begin_step` in its place and names it in the tracker; called by one rank at the end.

    What an earlier, killed attempt left in the folder is removed. Raises ValueError if a rank's file is missing.
    """
    root = Path(root)
    folder, final, previous = begin_step(root, iteration), checkpoint_dir(root, iteration), _aside(
        root, iteration, "previous"
    )  # fmt: skip
    expected = {
        rank_dir_name(tp_rank, stage, pipeline_parallel_size)
        for tp_rank in range(tensor_parallel_size)
        for stage in range(pipeline_parallel_size)
    }
    for name in sorted(expected):
        if not (folder / name / CHECKPOINT_FILE).is_file():
            raise ValueError(f"step {iteration} is incomplete: {folder / name / CHECKPOINT_FILE} was not written")
    for entry in folder.iterdir():
        if entry.name not in expected:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in expected:
        for leftover in (folder / name).glob(".*.tmp"):
            leftover.unlink()
        sync_folder(folder / name)
    sync_folder(folder)
    if final.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(final, previous)
    os.rename(folder, final)
    sync_folder(root)
    write_tracker(root, iteration)
    shutil.rmtree(previous, ignore_errors=True)
    return final


def available_iterations(root: Path) -> list[int]:
    """Iterations whose folders are in `root`, ascending."""
    names = (re.fullmatch(r"iter_([0-9]{7,})", entry.name) for entry in Path(root).iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in names if match)


def find_checkpoint(path: Path, iteration: Step | None = None) -> tuple[Path, Step]:
    """The folder of a step and its number, from a folder of steps or from a step's own folder; nothing is changed.

    Without `iteration` the tracker decides. Raises FileNotFoundError or ValueError saying what is there instead.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {path}")
    own = re.fullmatch(r"release|iter_([0-9]{7,})", path.name)
    if own and not (path / TRACKER_FILE).exists():
        step: Step = "release" if path.name == "release" else int(own.group(1))
        if iteration not in (None, step):
            raise ValueError(f"{path} is step {step}, not {iteration}: give the folder above it")
        return path, step
    chosen = read_tracker(path) if iteration is None else iteration
    if chosen is None:
        raise FileNotFoundError(f"{path} has no {TRACKER_FILE}: give a checkpoint folder, or the step's own folder")
    for candidate in (checkpoint_dir(path, chosen), _aside(path, chosen, "previous")):
        if candidate.is_dir():
            return candidate, chosen
    steps = [str(number) for number in available_iterations(path)]
    steps += ["release"] if (path / "release").is_dir() else []
    raise FileNotFoundError(f"{path} has no step {chosen}; it has: {', '.join(steps) or 'none'}")


def available_layout(folder: Path) -> tuple[int, int]:
    """Tensor- and pipeline-parallel size of a step's folder, from the names in it.

    Raises ValueError naming a rank that is missing, or if it was saved with expert parallelism.
    """
    folder = Path(folder)
    names = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name.startswith("mp_rank_")}
    if not names:
        raise ValueError(f"{folder} holds no mp_rank_* folder: it is not a Megatron checkpoint")
    ranks = []
    for name in sorted(names):
        match = re.fullmatch(r"mp_rank_([0-9]{2,})(?:_([0-9]{3,}))?(_[0-9]{3,})?", name)
        if not match:
            raise ValueError(f"{folder / name}: not the name of a rank's folder")
        if match.group(3):
            raise ValueError(f"{folder / name} was saved with expert parallelism, which is not supported yet")
        ranks.append((int(match.group(1)), int(match.group(2) or 0)))
    sizes = max(tp for tp, _ in ranks) + 1, max(pp for _, pp in ranks) + 1
    for tp_rank in range(sizes[0]):
        for stage in range(sizes[1]):
            name = rank_dir_name(tp_rank, stage, sizes[1])
            if not (folder / name / CHECKPOINT_FILE).is_file():
                raise ValueError(f"{folder / name / CHECKPOINT_FILE} is missing: the checkpoint is incomplete")
    return sizes
