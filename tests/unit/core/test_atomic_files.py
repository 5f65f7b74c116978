"""Leftovers of killed writers are removed, and nothing that a living one needs, whenever they are looked for."""

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest

from megatron.core.atomic_files import atomic_writer, remove_unfinished

FORK = multiprocessing.get_context("fork")


def elsewhere(action, *arguments) -> None:
    """Calls `action` in another process: locks are one process's, and no lock against itself."""
    process = FORK.Process(target=action, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _write_and_die(path: Path) -> None:
    with atomic_writer(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["before the lock", "while writing", "before the name"])
@pytest.mark.parametrize("keep_first", [False, True])
def test_what_a_living_process_writes_is_left_alone(
    tmp_path: Path, moment: str, keep_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = FORK.Process(target=_write_and_die, args=(tmp_path / "a.index",))
    died.start()
    died.join(60)
    assert died.exitcode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    removed = []

    def clean() -> None:
        if not removed:
            removed.append(True)
            elsewhere(remove_unfinished, tmp_path, "*.index")

    def first(function):
        def cleaned(*arguments, **options):
            result = function(*arguments, **options) if moment == "before the lock" else None
            clean()
            return function(*arguments, **options) if result is None else result

        return cleaned

    if moment == "before the lock":
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", first(tempfile.NamedTemporaryFile))
    if moment == "before the name":
        for name in ("replace", "link"):
            monkeypatch.setattr(os, name, first(getattr(os, name)))
    with atomic_writer(tmp_path / "b.index", keep_first) as file:
        file.write(b"whole")
        if moment == "while writing":
            clean()
    assert removed and [path.name for path in tmp_path.iterdir()] == ["b.index"]
    assert (tmp_path / "b.index").read_bytes() == b"whole"


def test_files_of_other_names_and_of_other_programs_stay(tmp_path: Path) -> None:
    names = {".a.json.x.tmp", "a.index.x.tmp", ".a.index.x", ".a.index.tmp", ".b.index.x.tmp.d"}
    for name in {*names, ".a.index.x.tmp"}:
        (tmp_path / name).touch()
    (tmp_path / ".folder.index.x.tmp").mkdir()
    remove_unfinished(tmp_path, "*.index")
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".folder.index.x.tmp"}
    remove_unfinished(tmp_path / "absent", "*.index")
