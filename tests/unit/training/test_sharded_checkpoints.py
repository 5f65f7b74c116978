"""Layout-free checkpoints in a run: damage, full disks, background writing and kills lose nothing."""

import errno
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_testing import (
    assert_same_tensors,
    checkpoint_arguments,
    load,
    save,
    saved_tensors,
    state_of,
    tiny_trainer,
    train,
)
from distributed_testing import run_distributed

from megatron.core import collectives, dist_checkpointing
from megatron.core.dist_checkpointing import writer
from megatron.core.interchange import available_iterations
from megatron.core.interchange.folder_kind import is_sharded, is_torch_dist
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.training.checkpoints.formats import SAVED_FORMATS, format_of, is_complete
from megatron.training.checkpoints.random_states import random_states
from megatron.training.checkpoints.saver import CheckpointSaver, checkpoint_namespace
from megatron.training.checkpoints.sharded import checkpoint_shards, rng_shards
from megatron.training.checkpoints.source import checkpoint_model
from megatron.training.checkpoints.steps import newest_complete_step
from megatron.training.progress import Progress, RunRecord
from megatron.training.setup import Trainer

Saved = tuple[Path, Trainer, Progress]
SHARD = "iter_0000001/rank_00000.safetensors"
METADATA = "iter_0000001/sharded.json"
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A checkpoint after a step, the trainer that made it, and its progress."""
    trainer = tiny_trainer(checkpoint_arguments(save=str(tmp_path / "run"), ckpt_format="sharded"))
    progress = Progress()
    train(trainer, progress, 1)
    save(trainer, progress)
    return tmp_path / "run", trainer, progress


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: list[tuple[str, Callable[[bytes], bytes] | None, str]] = [
    (SHARD, _flip, r"rank_00000.safetensors was altered: the checksum of \w+ of [\w.]+ does not match"),
    (SHARD, lambda content: content[:-1], "rank_00000.safetensors has [0-9]+ bytes, not [0-9]+"),
    (SHARD, lambda content: b"", "rank_00000.safetensors has 0 bytes"),
    (SHARD, None, "rank_00000.safetensors is missing"),
    (METADATA, lambda content: content[: len(content) // 2], "sharded.json is damaged or cut short"),
    (METADATA, lambda content: content.replace(b"exp_avg_sq", b"exp_avg_s9", 1), "sharded.json was altered"),
    (METADATA, None, "sharded.json is missing"),
    (TRACKER, lambda content: b"", "must hold an iteration"),
    (TRACKER, lambda content: b"-1", "must hold an iteration"),
    (TRACKER, lambda content: b"one", "must hold an iteration"),
    (TRACKER, lambda content: b"7", "has no step 7; it has: 1"),
]


def as_earlier_versions_named_it(step: Path) -> None:
    """Gives the description of a step the name and the format that it had before."""
    content = (step / "sharded.json").read_text().replace("megatron-mixtral sharded", "megatron-mixtral training", 1)
    (step / "sharded.json").unlink()
    (step / "metadata.json").write_text(content)


def test_a_step_under_the_old_file_name_is_resumed_and_removed_like_others(saved: Saved) -> None:
    root, first, progress = saved
    step = root / "iter_0000001"
    as_earlier_versions_named_it(step)
    assert format_of(step) is SAVED_FORMATS["sharded"] and is_complete(step)
    assert checkpoint_model(str(root)).hidden_size == first.arguments.model.hidden_size
    second = tiny_trainer(checkpoint_arguments(load=str(root), save=str(root), keep_last_checkpoints=2))
    resumed, _ = load(second)
    assert resumed == progress
    assert_same_tensors(state_of(second), state_of(first))
    save(second, resumed)
    assert (step / "sharded.json").exists() and not (step / "metadata.json").exists()
    as_earlier_versions_named_it(step)
    for iteration in (2, 3):
        assert newest_complete_step(root) == iteration - 1
        save(second, replace(resumed, iteration=iteration))
    assert available_iterations(root) == [2, 3]


def test_the_file_name_that_megatron_has_too_is_ours_only_without_its_other_files(saved: Saved) -> None:
    root, _, _ = saved
    step = root / "iter_0000001"
    as_earlier_versions_named_it(step)
    for file in step.glob("rank_*.safetensors"):
        file.unlink()
    assert is_sharded(step) and not is_torch_dist(step)
    (step / ".metadata").touch()
    assert is_torch_dist(step) and not is_sharded(step)
    (step / ".metadata").unlink()
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    with pytest.raises(
        ValueError, match=r"metadata\.json is of a checkpoint of Megatron-LM, whose other files are mis"
    ):
        load(tiny_trainer(checkpoint_arguments(load=str(root))))


def test_damage_is_refused_and_nothing_changes(saved: Saved) -> None:
    root, _, _ = saved
    trainer = tiny_trainer(checkpoint_arguments(load=str(root)))
    before = state_of(trainer)
    for name, spoil, message in DAMAGE:
        content = (root / name).read_bytes()
        (root / name).unlink() if spoil is None else (root / name).write_bytes(spoil(content))
        for same_folder in (False, True):
            checkpoint = replace(trainer.arguments.checkpoint, save=str(root) if same_folder else None)
            with pytest.raises(ValueError, match=message):
                load(replace(trainer, arguments=replace(trainer.arguments, checkpoint=checkpoint)))
            assert_same_tensors(state_of(trainer), before)
        (root / name).write_bytes(content)
    load(trainer)


def test_missing_and_unexpected_tensors_are_listed(saved: Saved, tmp_path: Path) -> None:
    _, trainer, _ = saved
    shards = dist_checkpointing.snapshot(_shards(trainer))
    state: dict[str, dict[str, Any]] = {"progress": {}, "optimizer": {}}
    arguments = vars(_namespace(trainer))
    dropped = next(shard for shard in shards if shard.kind == "exp_avg" and "router" in shard.name)
    others = [shard for shard in shards if shard is not dropped]
    others.append(replace(dropped, kind="weight", name="decoder.surprise"))
    step = tmp_path / "iter_0000001"

    def write(content: list[Any]) -> None:
        step.mkdir(exist_ok=True)
        written = dist_checkpointing.write_shards(step, 0, content)
        dist_checkpointing.write_metadata(step, [written], iteration=1, arguments=arguments, state=state)

    write(others)
    fresh = tiny_trainer(checkpoint_arguments(load=str(step)))
    with pytest.raises(ValueError, match=rf"exp_avg of {dropped.name} is missing; weight of decoder.surprise is un"):
        load(fresh)
    write([shard for shard in shards if shard.kind == "weight"])
    with pytest.raises(ValueError, match="holds no optimizer state: add --no-load-optim"):
        load(fresh)
    state["progress"]["newcomer"] = 1
    write(shards)
    with pytest.raises(ValueError, match="saved by another version, which also kept newcomer"):
        load(fresh)
    load(tiny_trainer(checkpoint_arguments(load=str(step), finetune=True)))


def _shards(trainer: Trainer) -> list[Any]:
    return checkpoint_shards(trainer.model, trainer.optimizer, trainer.groups)


def _namespace(trainer: Trainer) -> Any:
    return checkpoint_namespace(trainer.arguments, Progress())


def test_a_full_disk_leaves_the_older_step(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    root, trainer, progress = saved
    whole = writer._write_block

    def full_disk(file: Any, data: Any, block: Any) -> int:
        if file.tell() > 20000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(file, data, block)

    monkeypatch.setattr(writer, "_write_block", full_disk)
    with pytest.raises(ValueError, match=r"rank_00000.safetensors: No space left"):
        save(trainer, replace(progress, iteration=2))
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", TRACKER]


class _SlowDisk:
    """Holds back the background writer until released, or makes it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.error = threading.Event(), ""
        write = dist_checkpointing.write_shards

        def wait_and_write(*args: Any) -> Any:
            assert self.go.wait(60)
            if self.error:
                raise OSError(errno.EIO, self.error)
            return write(*args)

        monkeypatch.setattr(dist_checkpointing, "write_shards", wait_and_write)


def test_a_background_save_holds_what_was_there_when_it_began(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    root, trainer, progress = saved
    disk = _SlowDisk(monkeypatch)
    arguments = replace(trainer.arguments, checkpoint=replace(trainer.arguments.checkpoint, async_save=True))
    saver = CheckpointSaver(replace(trainer, arguments=arguments), RunRecord())
    saver.save(progress)
    train(trainer, progress, 1)
    saver.poll()
    assert not (root / "iter_0000002").exists()
    before = saved_tensors(root / "iter_0000001")
    shutil.rmtree(root / "iter_0000001")  # what is there later is the background's
    disk.go.set()
    saver.save(progress)  # waits for the one before
    again = saved_tensors(root / "iter_0000001")
    assert all(again[key].equal(before[key]) for key in before)
    saver.finish()
    later = saved_tensors(root / "iter_0000002")
    assert not any(later[key].equal(before[key]) for key in before if key[0] == "exp_avg")
    assert (root / TRACKER).read_text() == "2"


def test_a_failed_background_save_is_reported_at_the_next_step(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    root, trainer, progress = saved
    disk = _SlowDisk(monkeypatch)
    arguments = replace(trainer.arguments, checkpoint=replace(trainer.arguments.checkpoint, async_save=True))
    saver = CheckpointSaver(replace(trainer, arguments=arguments), RunRecord())
    saver.save(replace(progress, iteration=2))
    saver.poll()
    disk.error = "the disk is on fire"
    disk.go.set()
    assert saver._writer is not None
    saver._writer.join()
    with pytest.raises(ValueError, match="iteration 2 could not be saved: the disk is on fire"):
        saver.poll()
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", TRACKER]
    saver.finish()


def test_only_who_may_wait_long_asks_over_gloo(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step the communicator of training asks, whose timeout is too short for the end of a save."""
    _, trainer, progress = saved
    disk, asked = _SlowDisk(monkeypatch), list[Any]()
    arguments = replace(trainer.arguments, checkpoint=replace(trainer.arguments.checkpoint, async_save=True))
    saver = CheckpointSaver(replace(trainer, arguments=arguments), RunRecord())
    saver.save(progress)
    with monkeypatch.context() as patch:
        patch.setattr(collectives, "all_reduce", lambda numbers, op, group: asked.append((group, op)))
        names: dict[str, Any] = {name: Group((0, 1), 0, name) for name in ("world", "control")}  # type: ignore[arg-type]
        saver.groups = replace(trainer.groups, **names)
        saver.poll(torch.device("cpu"))
        saver.poll()
    assert asked == [("world", dist.ReduceOp.MAX), ("control", dist.ReduceOp.MAX)]
    saver.groups = trainer.groups
    disk.go.set()
    saver.finish()


def _die_at(folder: str, operation: int) -> None:
    """Kills this process at the given file operation in `folder`: opening, writing, syncing, renaming, removing."""
    count = 0

    def step(path: object) -> None:
        nonlocal count
        if str(path).startswith(folder):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            step(args[0])

    sys.addaudithook(audit)
    sync, write, writes = os.fsync, writer._write_block, 0

    def counted_sync(descriptor: int) -> None:
        step(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def counted_write(file: Any, data: Any, block: Any) -> int:
        nonlocal writes
        writes += 1
        if writes % 60 == 0:  # a save has some hundred; what comes after them matters more
            file.flush()
            step(folder)
        return write(file, data, block)

    os.fsync = counted_sync
    writer._write_block = counted_write


def _run(folder: str, operation: int, async_save: bool) -> None:
    """Trains to the third step, saving each and the second one twice; resumes what is there."""
    settings = {"save": folder, "load": folder, "ckpt_format": "sharded", "keep_last_checkpoints": 1}
    trainer = tiny_trainer(checkpoint_arguments(**settings, async_save=async_save))
    progress, _ = load(trainer)
    if operation:
        _die_at(folder, operation)
    saver = CheckpointSaver(trainer, RunRecord())
    while progress.iteration < 3:
        train(trainer, progress, 1)
        saver.save(progress)
        if progress.iteration == 2:
            saver.save(progress)
        saver.poll()
    saver.finish()


def _outcome(folder: Path, operation: int, async_save: bool) -> int:
    """Runs in a separate process; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            _run(str(folder), operation, async_save)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def _kill_and_restart(rank: int, world_size: int, root: str, operations: Iterable[int], async_save: bool) -> int:
    """Kills a run at each of `operations` in turn, restarts it and compares; returns how many kills there were."""
    assert _outcome(Path(root) / "whole", 0, async_save) == 0
    whole = saved_tensors(Path(root) / "whole" / "iter_0000003")
    kills = 0
    for operation in operations:
        folder = Path(root) / f"killed_{operation}"
        status = _outcome(folder, operation, async_save)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, operation
        kills += 1
        assert _outcome(folder, 0, async_save) == 0, operation
        ours = saved_tensors(folder / "iter_0000003")
        assert all(ours[key].equal(whole[key]) for key in whole), operation
        leftovers = [path.name for path in folder.iterdir() if path.name not in ("iter_0000003", TRACKER)]
        # a run killed at its very end has nothing left to save, and so nothing that would clean up
        assert set(leftovers) <= {"iter_0000002", ".iter_0000002.removing"}, (operation, leftovers)
        shutil.rmtree(folder)
    return kills


# one process that has imported everything and has no threads, and forks
def test_a_killed_save_loses_nothing(tmp_path: Path) -> None:
    # while the first tensors are written; with a step but no tracker; between the two moves of a step that is replaced
    assert run_distributed(_kill_and_restart, 1, str(tmp_path), (7, 24, 87), False) == [3]


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_killed_at_any_operation_loses_nothing(tmp_path: Path, async_save: bool) -> None:
    step, killed, first = (4 if async_save else 1), 0, 1
    while True:  # a few at a time; the last ones find that the run ends before the operation
        folder = tmp_path / str(first)
        folder.mkdir()
        operations = range(first, first + 3 * step, step)
        (kills,) = run_distributed(_kill_and_restart, 1, str(folder), operations, async_save)
        killed, first = killed + kills, operations.stop
        if kills < len(operations):
            break
    assert killed > 60 / step


def test_a_run_on_a_cpu_does_not_touch_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: pytest.fail("a state of the GPU was asked for"))
    assert [shard.name for shard in rng_shards(ProcessGroups())] == ["cpu"]
    assert list(random_states()) == ["cpu"]
