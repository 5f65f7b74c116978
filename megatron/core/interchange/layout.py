"""Names of checkpoint folders, the tracker file, and the atomic replacement of a whole step.

A step is written to a hidden folder next to its place, moved there when all ranks are done, and only then named by the
tracker. An older copy of the same step is moved aside first and removed last; between the two moves, and after a kill
there, the older copy is what `find_checkpoint` gives.
"""

import math
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.core.atomic_files import atomic_writer, sync_folder
from megatron.core.interchange.folder_kind import is_torch_dist, not_a_checkpoint
from megatron.core.interchange.torch_file import index_torch

TRACKER_FILE = "latest_checkpointed_iteration.txt"
CHECKPOINT_FILE = "model_optim_rng.pt"
CHECKPOINT_VERSION = 3.0
Step = int | Literal["release"]


@dataclass(frozen=True)
class Layout:
    """The parallel sizes of a step in this format, and from them the names of its folders.

    A folder is named by its tensor-, pipeline- and expert-parallel rank, so the expert tensor-parallel rank has to
    follow from the tensor-parallel rank (as tp modulo its size). Raises ValueError where it does not.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    """Ranks that split each expert's matrices; `tensor` if None."""

    def __post_init__(self) -> None:
        if self.tensor % self.etp:
            raise ValueError(
                f"an expert tensor-parallel size of {self.etp} with a tensor-parallel size of {self.tensor} cannot be "
                "stored in folders named by tensor, pipeline and expert rank: choose a size that divides the "
                "tensor-parallel size, or --ckpt-format sharded"
            )

    @property
    def etp(self) -> int:
        """Ranks that split each expert's matrices."""
        return self.expert_tensor or self.tensor

    @property
    def writers_per_stage(self) -> int:
        """How many ranks of a stage write: the first ones, counted within the stage in the grid's order."""
        return math.lcm(self.tensor, self.etp * self.expert)

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """(tensor, pipeline, expert) rank of every folder of a step."""
        for stage in range(self.pipeline):
            for rank in range(self.writers_per_stage):
                yield rank % self.tensor, stage, rank // self.etp % self.expert

    def folder(self, tp_rank: int, pp_rank: int = 0, ep_rank: int = 0) -> str:
        """Name of one rank's folder."""
        return rank_dir_name(tp_rank, pp_rank, self.pipeline, ep_rank, self.expert)

    def __str__(self) -> str:
        text = f"tensor-parallel size {self.tensor}, pipeline-parallel size {self.pipeline}"
        if self.expert > 1 or self.etp != self.tensor:
            text += f", expert-parallel size {self.expert}, expert-tensor-parallel size {self.etp}"
        return text


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


def commit_step(root: Path, iteration: Step, layout: Layout) -> Path:
    """Puts the step written since `begin_step` in its place and names it in the tracker; called by one rank at the end.

    What an earlier, killed attempt left in the folder is removed. Raises ValueError if a rank's file is missing.
    """
    folder = begin_step(root, iteration)
    expected = {layout.folder(*ranks) for ranks in layout.ranks()}
    for name in sorted(expected):
        if not (folder / name / CHECKPOINT_FILE).is_file():
            raise ValueError(f"step {iteration} is incomplete: {folder / name / CHECKPOINT_FILE} was not written")
        for leftover in (folder / name).glob(".*.tmp"):
            leftover.unlink()
        sync_folder(folder / name)
    return replace_step(root, iteration, expected)


def replace_step(root: Path, iteration: Step, expected: Collection[str]) -> Path:
    """Moves what was written since `begin_step` to its place and names it in the tracker.

    Only the `expected` entries of the folder are kept.
    """
    root = Path(root)
    folder, final, previous = begin_step(root, iteration), checkpoint_dir(root, iteration), _aside(
        root, iteration, "previous"
    )  # fmt: skip
    for entry in folder.iterdir():
        if entry.name not in expected:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
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
        raise _without_tracker(path)
    for candidate in (checkpoint_dir(path, chosen), _aside(path, chosen, "previous")):
        if candidate.is_dir():
            return candidate, chosen
    steps = ", ".join(map(str, _steps(path)))
    raise FileNotFoundError(f"{path} has no step {chosen}; it has: {steps or 'none'}")


def _steps(root: Path) -> list[Step]:
    release: list[Step] = ["release"] if (root / "release").is_dir() else []
    return [*available_iterations(root), *release]


def _without_tracker(path: Path) -> Exception:
    """What to do about a folder that does not say which step is meant."""
    steps = ", ".join(map(step_name, _steps(path)))
    if steps:
        return FileNotFoundError(f"{path} has no {TRACKER_FILE}: give the folder of a step in it: {steps}")
    if is_torch_dist(path) and (path / "metadata.json").exists():  # which other programs' have not
        return ValueError(
            f"{path} is a step in Megatron-LM's torch_dist format under another name: rename the folder to release"
        )
    kind = not_a_checkpoint(path)
    if kind is not None:
        return ValueError(f"{path} {kind}")
    return FileNotFoundError(f"{path} has no {TRACKER_FILE}: give a checkpoint folder, or the step's own folder")


def available_layout(folder: Path) -> Layout:
    """The sizes a step was saved at, from the names in its folder and from the `args` in its first file.

    The names alone do not tell a pipeline rank from an expert rank, nor how experts are split. Raises ValueError
    naming a rank that is missing or does not belong there.
    """
    folder = Path(folder)
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name.startswith("mp_rank_"))
    if not names:
        kind = not_a_checkpoint(folder) or "holds no mp_rank_* folder: it is not a Megatron checkpoint"
        raise ValueError(f"{folder} {kind}")
    matches = {name: re.fullmatch(r"mp_rank_([0-9]{2,})(?:_([0-9]{3,}))?(?:_([0-9]{3,}))?", name) for name in names}
    for name, match in matches.items():
        if match is None:
            raise ValueError(f"{folder / name}: not the name of a rank's folder")
    first, second, third = (
        max(int(match.group(group) or 0) for match in matches.values() if match is not None) + 1 for group in (1, 2, 3)
    )
    args = index_torch(folder / names[0] / CHECKPOINT_FILE).get("args")
    stored = [getattr(args, f"{kind}_model_parallel_size", None) for kind in ("tensor", "pipeline", "expert")]
    expert_tensor = getattr(args, "expert_tensor_parallel_size", None)
    if second > 1 and third == 1 and stored[1] == 1:
        second, third = 1, second
    found = (first, second, third)
    if any(there not in (None, here) for there, here in zip(stored, found, strict=True)):
        raise ValueError(
            f"{folder} has folders for tensor x pipeline x expert parallel sizes {found[0]} x {found[1]} x {found[2]}, "
            f"but was saved with {stored[0]} x {stored[1]} x {stored[2] or 1}: files are missing or mixed up"
        )
    layout = Layout(first, second, third, expert_tensor if isinstance(expert_tensor, int) else None)
    expected = {layout.folder(*ranks) for ranks in layout.ranks()}
    for name in sorted(expected):
        if not (folder / name / CHECKPOINT_FILE).is_file():
            raise ValueError(f"{folder / name / CHECKPOINT_FILE} is missing: the checkpoint is incomplete")
    for name in names:
        if name not in expected:
            raise ValueError(f"{folder / name} does not belong to a checkpoint of {layout}: remove it")
    return layout
