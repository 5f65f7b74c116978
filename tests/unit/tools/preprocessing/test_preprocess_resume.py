"""Runs that are killed leave nothing that loads, and --resume ends with the bytes of an undisturbed run."""

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preprocessing_testing
import pytest
from preprocessing_testing import outputs, write_corpus

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tools import preprocess_data
from tools.preprocessing import inputs, part

KEYS = ("text", "title")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(part, "SECONDS_BETWEEN_JOURNALS", 0.0)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": " ".join(str(k % 99) for k in range(i)), "title": f"{i}"}) for i in range(1, 60)]
    lines[7] = '{"text": "1"'
    folder = write_corpus(tmp_path / "corpus", [lines[:30] + [""] * 40 + lines[30:], lines, lines], compressed=1)
    (folder / "1a.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 200\n")
    return folder


def arguments(corpus: Path, prefix: Path, *more: str) -> list[str]:
    return preprocessing_testing.arguments(corpus, prefix, "--allow-damaged-files", "--json-keys", *KEYS, *more)


def killed_at(call: int, command: list[str]) -> int:
    """Runs the tool in a child that kills itself at its `call`-th step towards the disk; returns the steps it took."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        steps = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return step

        os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = preprocess_data.main(command)
        os.write(writable, str(steps).encode())
        os._exit(status)
    os.close(writable)
    status = os.waitpid(pid, 0)[1]
    with open(readable) as pipe:
        steps = int(pipe.read() or call)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if steps == call else 0)
    return steps


@pytest.mark.parametrize("resume", [True, False])
def test_killed_at_any_step(tmp_path: Path, corpus: Path, resume: bool) -> None:
    """At every 29th step on the way, and at each of those that give the files their names."""
    steps = killed_at(1 << 30, arguments(corpus, tmp_path / "clean"))
    clean = outputs(tmp_path / "clean")
    assert len(clean) == 7 and steps > 80, "two data sets of three files, and the quarantine"
    prefix = tmp_path / "out"
    resumed = 0
    for step in [*range(1, steps - 22, 29), *range(steps - 22, steps + 1, 1 if resume else 7)]:
        assert killed_at(step, arguments(corpus, prefix)) == step
        for key in KEYS:
            left = outputs(prefix)
            if f"_{key}_document.idx" in left:
                assert left[f"_{key}_document.idx"] == clean[f"_{key}_document.idx"]
                assert left[f"_{key}_document.bin"] == clean[f"_{key}_document.bin"]
            else:
                with pytest.raises(FileNotFoundError):
                    IndexedDataset(f"{prefix}_{key}_document")
        resumed += Path(f"{prefix}_resume.json").exists()
        assert preprocess_data.main(arguments(corpus, prefix, *["--resume"] * resume)) == 0
        assert outputs(prefix) == clean, f"killed at step {step} of {steps}"
        for path in tmp_path.glob("out*"):
            path.unlink()
    assert resumed > 4


def test_killed_twice_and_resumed_twice(tmp_path: Path, corpus: Path) -> None:
    assert preprocess_data.main(arguments(corpus, tmp_path / "clean")) == 0
    prefix = tmp_path / "out"
    assert killed_at(40, arguments(corpus, prefix)) == 40
    first = json.loads(Path(f"{prefix}_resume.json").read_text())
    assert killed_at(30, arguments(corpus, prefix, "--resume")) == 30
    second = json.loads(Path(f"{prefix}_resume.json").read_text())
    assert second["statistics"]["read_bytes"] > first["statistics"]["read_bytes"] > 0
    assert preprocess_data.main(arguments(corpus, prefix, "--resume", "--workers", "2")) == 0
    assert outputs(prefix) == outputs(tmp_path / "clean")


@pytest.mark.parametrize("change", ["file", "flag", "journal", "temporary"])
def test_what_does_not_fit_is_not_resumed(tmp_path: Path, corpus: Path, capsys, change: str) -> None:
    prefix = tmp_path / "out"
    assert killed_at(40, arguments(corpus, prefix)) == 40
    more = ["--resume"]
    if change == "file":
        with open(corpus / "0.jsonl", "a") as file:
            file.write('{"text": "1", "title": "2"}\n')
    elif change == "flag":
        more.append("--append-bos")
    elif change == "journal":
        Path(f"{prefix}_resume.json").write_text("{}")
    else:
        Path(f"{prefix}_text_document.bin.tmp").write_bytes(b"")
    before = outputs(prefix)
    assert preprocess_data.main(arguments(corpus, prefix, *more)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    expected = {
        "file": "files have changed", "flag": "no such token", "journal": "cannot be read", "temporary": "is shorter",
    }  # fmt: skip
    assert expected[change] in error
    assert outputs(prefix) == before, "an interrupted run is not lost by a wrong command"


def test_nothing_to_resume_is_a_start(tmp_path: Path, corpus: Path, capsys) -> None:
    assert preprocess_data.main(arguments(corpus, tmp_path / "out", "--resume")) == 0
    assert "there is no interrupted run to resume" in capsys.readouterr().out


@pytest.mark.parametrize("size", [500, 3000, 9000])
def test_a_disk_that_fills_up_ends_the_run_and_resume_goes_on(tmp_path: Path, corpus: Path, capsys, size: int) -> None:
    """No file may grow beyond `size` bytes, which is what a full disk looks like from here."""
    assert preprocess_data.main(arguments(corpus, tmp_path / "clean")) == 0
    prefix = tmp_path / "out"
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        status = preprocess_data.main(arguments(corpus, prefix))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and error.startswith("error: ") and "File too large" in error and str(prefix) in error
    with pytest.raises(FileNotFoundError):
        IndexedDataset(f"{prefix}_text_document")
    kept = Path(f"{prefix}_resume.json").exists()
    assert kept == ("the same command with --resume goes on" in error) and kept == (size > 500)
    assert preprocess_data.main(arguments(corpus, prefix, "--resume")) == 0
    assert ("resuming after" in capsys.readouterr().out) == kept
    assert outputs(prefix) == outputs(tmp_path / "clean")
