"""Several ranks write together what one process writes, and fail in words when one of them does."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from preprocessing_testing import arguments, outputs, write_corpus

from tools import preprocess_data
from tools.preprocessing import inputs
from tools.preprocessing.ranks import Place, place_from

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    files = []
    for number in range(4):
        lines = [json.dumps({"text": " ".join(str(k % 99) for k in range(i % 30))}) for i in range(300)]
        for bad in (3, 100, 299):
            lines[bad] = f"bad {number}"
        files.append(lines)
    return write_corpus(tmp_path / "corpus", files, compressed=2)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    def run(rank: int, ranks: int, command: list[str]) -> int:
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(ranks))
            return preprocess_data.main(command)

    return run


@pytest.mark.parametrize("ranks", [2, 3, 11])
@pytest.mark.parametrize("size", [500, 1 << 20])
def test_ranks_write_what_one_process_writes(tmp_path: Path, corpus: Path, ranks: int, size: int, as_rank, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", size)
    assert preprocess_data.main(arguments(corpus, tmp_path / "one")) == 0
    for rank in reversed(range(ranks)):
        assert as_rank(rank, ranks, arguments(corpus, tmp_path / "many")) == 0
    assert outputs(tmp_path / "many") == outputs(tmp_path / "one")
    assert len(outputs(tmp_path / "one")) == 4


@pytest.mark.parametrize("size", [500, 1 << 20])
def test_ranks_and_workers_agree_about_files_in_trouble(tmp_path: Path, corpus: Path, size: int, as_rank, monkeypatch):
    """An empty file, a pointer, one that breaks off, blank lines, a table with a bad value, and what is left aside."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", size)
    lines = "".join(json.dumps({"text": f"{i * i % 99} {i % 99}"}) + "\n" * (1 + 9 * (i % 50 == 0)) for i in range(900))
    broken = gzip.compress(lines.encode() * 40, compresslevel=0)
    broken = broken[: len(broken) // 2] + b"\xff" * (len(broken) // 2)
    (corpus / "1a.jsonl").write_bytes(b"")
    (corpus / "1b.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000\n")
    (corpus / "2a.jsonl.gz").write_bytes(broken)
    (corpus / "2b.jsonl").write_text(lines + "\n" * 2000 + "bad\n")
    (corpus / "notes.txt").write_text(lines)
    more = ("--max-bad-fraction", "1", "--allow-damaged-files")
    assert preprocess_data.main(arguments(corpus, tmp_path / "one", *more)) == 0
    assert preprocess_data.main([*arguments(corpus, tmp_path / "two", *more), "--workers", "3"]) == 0
    for rank in reversed(range(3)):
        assert as_rank(rank, 3, arguments(corpus, tmp_path / "many", *more)) == 0
    assert outputs(tmp_path / "many") == outputs(tmp_path / "two") == outputs(tmp_path / "one")
    record = json.loads((tmp_path / "one_text_document.json").read_text())["input"]
    assert [Path(row["path"]).name for row in record["files"] if "trouble" in row] == [
        "1a.jsonl", "1b.jsonl", "2a.jsonl.gz",
    ]  # fmt: skip
    lost = {Path(row["path"]).name: row.get("lost_bytes", 0) for row in record["files"]}
    assert lost["1b.jsonl"] == 5000 and lost["2b.jsonl"] == len("bad\n")
    assert record["left_aside"] == {".txt": 1} and lost["2a.jsonl.gz"] > len(broken) // 3


def start_rank(rank: int, ranks: int, command: list[str]) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    environment |= {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(ranks)}
    program = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *command]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ranks_that_run_at_once(tmp_path: Path, corpus: Path) -> None:
    assert preprocess_data.main(arguments(corpus, tmp_path / "one")) == 0
    processes = [start_rank(rank, 3, arguments(corpus, tmp_path / "many")) for rank in range(3)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert outputs(tmp_path / "many") == outputs(tmp_path / "one")


def test_a_failure_of_one_rank_ends_the_others(tmp_path: Path, corpus: Path) -> None:
    """Rank 1 cannot read its part; rank 0 says so, long before the time limit for silence, and leaves no data set."""
    wrong = arguments(tmp_path / "elsewhere", tmp_path / "many")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.jsonl").write_text('{"body": "1"}\n' * 9)
    processes = [start_rank(0, 2, arguments(corpus, tmp_path / "many")), start_rank(1, 2, [*wrong, "--append-bos"])]
    errors = [process.communicate(timeout=50)[1].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert errors[1] == "[rank 1 of 2] error: --append-bos: this tokenizer has no such token"
    assert errors[0] == "[rank 0 of 2] error: rank 1 failed: --append-bos: this tokenizer has no such token"
    assert not list(tmp_path.glob("many_text_document*"))


def test_a_failure_before_this_rank_began_is_named(tmp_path: Path, corpus: Path, as_rank, capsys, monkeypatch) -> None:
    """A rank that failed at once, and whose failure no new start of it has replaced."""
    monkeypatch.setattr("tools.preprocessing.ranks._SECONDS_TO_RESTART", 0.0)
    (tmp_path / "many_rank00001of00002_status.json").write_text('{"state": "failed", "error": "no such file"}')
    assert as_rank(0, 2, arguments(corpus, tmp_path / "many")) == 1
    assert "error: rank 1 failed: no such file" in capsys.readouterr().err


def test_a_silent_rank_is_named(tmp_path: Path, corpus: Path, as_rank, capsys) -> None:
    command = arguments(corpus, tmp_path / "many", "--rank-timeout", "1")
    assert as_rank(0, 2, command) == 1
    assert "error: rank 1 has not begun in 1 seconds" in capsys.readouterr().err
    (tmp_path / "many_rank00001of00002_status.json").write_text('{"state": "working", "beat": 3}')
    assert as_rank(0, 2, command) == 1
    assert "error: rank 1 has shown no sign of life for 1 seconds" in capsys.readouterr().err
    assert as_rank(1, 2, arguments(corpus / "0.jsonl", tmp_path / "many")) == 0
    assert as_rank(0, 2, command) == 1
    assert "error: rank 1 read other files than rank 0 would" in capsys.readouterr().err
    assert as_rank(1, 2, command) == 0
    assert as_rank(0, 2, command) == 0, "what rank 0 had done before is used"
    assert preprocess_data.main(arguments(corpus, tmp_path / "one")) == 0
    assert outputs(tmp_path / "many") == outputs(tmp_path / "one")


@pytest.mark.parametrize("damage", ["missing", "shorter", "other"])
def test_missing_bytes_of_a_rank_are_noticed(tmp_path: Path, corpus: Path, damage: str, as_rank, capsys) -> None:
    command = arguments(corpus, tmp_path / "many")
    assert as_rank(1, 2, command) == 0
    tokens = tmp_path / "many_rank00001of00002_text_document.bin"
    content = tokens.read_bytes()
    tokens.write_bytes({"missing": b"", "shorter": content[:-2], "other": content[:-1] + b"\x01"}[damage])
    if damage == "missing":
        tokens.unlink()
    assert as_rank(0, 2, command) == 1
    reason = {"missing": "does not exist", "shorter": "bytes long", "other": "has changed since"}[damage]
    error = capsys.readouterr().err.splitlines()[-1]
    assert tokens.name in error and reason in error
    assert not list(tmp_path.glob("many_text_document*"))


def test_too_many_bad_lines_of_all_ranks_are_refused(tmp_path: Path, corpus: Path, as_rank, capsys) -> None:
    command = arguments(corpus, tmp_path / "many", "--max-bad-fraction", "0.001")
    for rank in (1, 0):
        status = as_rank(rank, 2, command)
    assert status == 1 and "of the input is bad (invalid JSON 12;" in capsys.readouterr().err
    assert not list(tmp_path.glob("many_text_document*"))


def test_places_are_read_from_the_environment() -> None:
    assert place_from({}) == Place(0, 1)
    assert place_from({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == Place(3, 8)
    srun = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "9"}
    assert place_from(srun) == Place(1, 9)
    assert place_from(srun | {"SLURM_STEP_NUM_TASKS": "2"}) == Place(1, 2)
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}
    assert place_from(batch) == Place(0, 1), "a batch script is not started once a task"
    shell = srun | {"SLURM_PROCID": "0", "SLURM_PTY_PORT": "40000"}
    assert place_from(shell) == Place(0, 1), "a shell of srun --pty is one process"
    assert place_from(shell | {"RANK": "1", "WORLD_SIZE": "4"}) == Place(1, 4), "torchrun in such a shell"
    with pytest.raises(ValueError, match="leave --pty out"):
        place_from(shell | {"SLURM_PROCID": "1"})
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="are not a rank of a job"):
            place_from(wrong)
