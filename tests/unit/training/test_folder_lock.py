"""One job a folder: who is alive keeps others out, and who is dead does not."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.core.atomic_files import atomic_writer, remove_unfinished
from megatron.training.checkpoints import folder_lock
from megatron.training.checkpoints.folder_lock import LOCK_FILE, FolderLock
from megatron.training.checkpoints.steps import remove_leftovers

QUICK = {"interval": 0.1, "patience": 2.0}


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_POLL", 0.05)


def _hold(folder: str, ready: object, boot: str | None) -> None:
    if boot is not None:
        folder_lock._boot = lambda: boot  # type: ignore[assignment]
    FolderLock(Path(folder), **QUICK).acquire(print)
    ready.set()  # type: ignore[attr-defined]
    multiprocessing.Event().wait()


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[multiprocessing.Process]:
    """Another process that holds the lock, on a machine of another name if one is given."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready, getattr(request, "param", None)), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process  # type: ignore[misc]
    process.kill()
    process.join()


@pytest.mark.parametrize("holder", [None, "another machine"], indirect=True)
def test_a_living_job_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path, holder: multiprocessing.Process) -> None:
    with pytest.raises(ValueError, match=rf"process {holder.pid} on .* is saving to {tmp_path} since .*another --save"):
        FolderLock(tmp_path, **QUICK).acquire(print)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid
    holder.kill()
    holder.join()
    lock = FolderLock(tmp_path, **QUICK)
    lock.acquire(print)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("holder", ["another machine"], indirect=True)
@pytest.mark.parametrize("locks", [False, None, True], ids=["held for ever", "none", "of each machine alone"])
def test_where_locks_do_not_tell_the_file_does(
    tmp_path: Path, holder: multiprocessing.Process, monkeypatch: pytest.MonkeyPatch, locks: bool | None
) -> None:
    monkeypatch.setattr(folder_lock, "_try_lock", lambda descriptor: locks)
    with pytest.raises(ValueError, match="is saving to"):
        FolderLock(tmp_path, **QUICK).acquire(print)
    holder.kill()
    holder.join()
    said: list[str] = []
    lock = FolderLock(tmp_path, **QUICK)
    lock.acquire(said.append)
    assert len(said) == 1 and "waiting up to 2 s" in said[0]
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_who_was_replaced_saves_no_more(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, **QUICK)
    lock.acquire(print)
    (tmp_path / LOCK_FILE).unlink()  # by hand: no reason to stop
    lock.check()
    assert (tmp_path / LOCK_FILE).exists()
    (tmp_path / "new").write_text("{}")
    os.replace(tmp_path / "new", tmp_path / LOCK_FILE)
    with pytest.raises(ValueError, match="another job took over"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK_FILE).read_text() == "{}"


def test_leftovers_of_killed_runs_are_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    for name in (".iter_0000002.saving", ".iter_0000001.removing", ".iter_0000003.previous", "iter_0000003", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / ".iter_0000004.previous").mkdir()
    for name in (".probe-123", ".latest_checkpointed_iteration.txt.x.tmp", ".save.lock.host.1.tmp", ".probe-mine"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    kept = {"iter_0000003", "iter_0000004", "mine", ".probe-mine"}
    assert {entry.name for entry in tmp_path.iterdir()} == kept

    log = tmp_path / "m[1].jsonl"
    (tmp_path / ".m[1].jsonl.abc.tmp").touch()
    (tmp_path / ".m1.jsonl.abc.tmp").touch()
    ready, go = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork").Event()

    def write() -> None:
        with atomic_writer(log) as file:
            file.write(b"whole")
            ready.set()
            go.wait()

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    assert ready.wait(60)
    remove_unfinished(tmp_path, "m[[]1].jsonl")
    go.set()
    process.join()
    assert process.exitcode == 0
    assert log.read_bytes() == b"whole"
    assert [entry.name for entry in tmp_path.glob(".m*")] == [".m1.jsonl.abc.tmp"]
