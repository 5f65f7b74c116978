"""tools/data.py: what is in a data set, whether it is sound, and indices that training then finds."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import pretrain_gpt
from megatron.core.config import DataConfig
from megatron.core.datasets.description import DatasetDescription, file_sha256
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from megatron.core.tokenizers.null_tokenizer import NullTokenizer
from megatron.training import training
from megatron.training.config import TrainingConfig
from megatron.training.environment import Environment
from tools import data

REPOSITORY = Path(__file__).resolve().parents[3]
TOKENIZER = NullTokenizer(100)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Forty documents: 1 99, 2 2 99, 3 3 3 99, ..., with a description."""
    prefix = str(tmp_path / "numbers_text_document")
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for number in range(1, 41):
            writer.add_document([number] * number + [99])
        writer.finalize()
    describe(prefix)
    return prefix


def describe(prefix: str, **changes) -> None:
    description = DatasetDescription(
        key="text", tokenizer=TOKENIZER.identity | {"bos": None}, append_eod=True, append_bos=False,
        documents=40, tokens=860, dtype="uint16",
        sha256={"bin": file_sha256(f"{prefix}.bin"), "idx": file_sha256(f"{prefix}.idx")},
    )  # fmt: skip
    replace(description, **changes).write(prefix)


def test_info(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["info", f"{dataset}.bin", f"{dataset}.idx", f"{dataset}.json"]) == 0
    text = capsys.readouterr().out
    assert text.count(dataset) == 1
    for part in (
        "40 in 40 sequences", "860 of type uint16", "2 ... 6 ... 22 ... 37 ... 41 tokens",
        "NullTokenizer, vocabulary 100, EOD 99", "EOD to each document; text from key text",
    ):  # fmt: skip
        assert part in text, part
    Path(f"{dataset}.json").unlink()
    assert data.main(["info", dataset]) == 0
    assert f"there is no {dataset}.json" in capsys.readouterr().out


def test_a_good_data_set_is_called_good(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["verify", dataset]) == 0
    assert "good: structure, checksums and token ids below 100; 40 documents, 860 tokens" in capsys.readouterr().out
    Path(f"{dataset}.json").unlink()
    assert data.main(["verify", dataset]) == 0
    assert data.main(["verify", dataset, "--vocab-size", "100"]) == 0


def overwrite(path: str, position: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(content)


def break_token(prefix: str) -> None:
    overwrite(f"{prefix}.bin", 2 * 858, (100).to_bytes(2, "little"))
    describe(prefix)


def break_end(prefix: str) -> None:
    overwrite(f"{prefix}.bin", 2 * 4, (98).to_bytes(2, "little"))
    describe(prefix)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda prefix: overwrite(f"{prefix}.bin", 9, b"\1"), r"\.bin has a different SHA-256"),
        (lambda prefix: overwrite(f"{prefix}.idx", 0, b"X"), "is not an index"),
        (lambda prefix: overwrite(f"{prefix}.idx", 34, b"\5"), "disagree"),
        (lambda prefix: describe(prefix, tokens=859), "describes 40 documents of 859 uint16 tokens"),
        (lambda prefix: Path(f"{prefix}.json").write_text("{"), "is not JSON"),
        (lambda prefix: Path(f"{prefix}.bin").unlink(), "does not exist"),
        (break_token, "document 39 has the token id 100, outside the vocabulary of 100"),
        (break_end, "document 1 does not end with 99"),
    ],
)
def test_a_bad_data_set_is_called_bad(dataset: str, damage, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage(dataset)
    assert data.main(["verify", dataset]) == 1
    output = capsys.readouterr()
    assert re.search(f"{dataset}: bad: .*{reason}", output.out)
    assert output.err == "error: 1 of 1 data sets failed the check\n"


def test_token_ids_are_checked_throughout(dataset: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(data, "BLOCK_TOKENS", 7)
    Path(f"{dataset}.json").unlink()
    assert data.main(["verify", dataset, "--vocab-size", "40"]) == 1
    assert "document 0 has the token id 99, outside the vocabulary of 40" in capsys.readouterr().out
    overwrite(f"{dataset}.bin", 2 * 500, b"\xff\xff")
    assert data.main(["verify", dataset, "--vocab-size", "100"]) == 1
    assert "document 30 has the token id 65535" in capsys.readouterr().out


def test_show(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]
    assert data.main(["show", dataset, "2", *flags, "100"]) == 0
    output = capsys.readouterr()
    assert output.out == "--- document 0: 2 tokens\n1 99\n--- document 1: 3 tokens\n2 2 99\n" and not output.err
    assert data.main(["show", dataset, "9", "--first", "39", "--tokens", "2"]) == 0
    assert capsys.readouterr().out == "--- document 39: 41 tokens\n40 40 ...\n"
    assert data.main(["show", dataset, *flags, "101"]) == 0
    assert "warning: this is not the tokenizer of the data: vocabulary size" in capsys.readouterr().err
    assert data.main(["show", dataset, "9", "--first", "-1", "--tokens", "2"]) == 0
    assert capsys.readouterr().out == "--- document 39: 41 tokens\n40 40 ...\n"
    for first in ("40", "-41"):
        assert data.main(["show", dataset, "--first", first]) == 1
        assert f"has documents 0 to 39: there is no document {first}" in capsys.readouterr().err
    for number in ("-1", "0"):
        assert data.main(["show", dataset, number]) == 1
        assert "N is how many documents to show, at least 1" in capsys.readouterr().err


def test_training_finds_the_indices_that_were_built_ahead(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built in a separate process: neither torch.distributed nor a tokenizer is needed for that."""
    other = str(tmp_path / "other")
    with IndexedDatasetWriter(other, "uint16") as writer:
        for _ in range(30):
            writer.add_document(np.arange(20))
        writer.finalize()
    flags = f"--data-path 3 '{dataset}' 1 '{other}' --split 60,20,20 --seq-length 8 --global-batch-size 4 --seed 5 "
    flags += f"--train-samples 403 --eval-iters 3 --eval-interval 100 --data-cache-path '{tmp_path}/cache'"
    program = "import sys; from tools import data; code = data.main(sys.argv[1:]); "
    program += "assert 'torch.distributed' not in sys.modules or not __import__('torch').distributed.is_initialized(); "
    program += "sys.exit(code)"
    result = subprocess.run(
        [sys.executable, "-c", program, "build-index", *shlex.split(flags)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "data for training: 400 samples of 8 tokens" in result.stdout and result.stdout.count(dataset) == 3
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(built) == 6
    shape = (
        "--num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2 --num-experts 2 "
        "--max-position-embeddings 8 --micro-batch-size 4 --num-workers 0 --device cpu "
        "--tokenizer-type NullTokenizer --vocab-size 100 --exit-interval 1"
    )
    Path(f"{other}.json").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *shape.split(), *shlex.split(flags)])
    alone = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1)
    training._pretrain(alone, pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == built


def test_defaults_are_those_of_training() -> None:
    args = data.parse_arguments("build-index --train-iters 1 --global-batch-size 1".split())
    compared = 0
    for config in (DataConfig, TrainingConfig):
        for field in fields(config):
            if field.name in vars(args) and field.name not in ("train_iters", "global_batch_size", "train_samples"):
                assert getattr(args, field.name) == (field.default or None), field.name
                compared += 1
    assert compared == 12


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("info nowhere", 1, "nowhere.idx does not exist"),
        ("build-index --data-path a nan b --train-iters 1 --global-batch-size 1", 1, "--data-path"),
        ("build-index --data-path nowhere --train-iters 1 --global-batch-size 1", 1, "nowhere.idx does not exist"),
        ("build-index --train-iters 1 --global-batch-size 1", 1, "give --data-path"),
        ("build-index --data-path nowhere --train-iters 1 --global-batch-size 0", 1, "--global-batch-size"),
        ("build-index --data-path nowhere --train-iters 1", 2, "--global-batch-size"),
        ("inf", 2, "invalid choice"),
    ],
)
def test_mistakes_get_a_sentence(command: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = data.main(command.split())
    except SystemExit as error:
        assert isinstance(error.code, int)
        found = error.code
    assert found == code
    assert message in capsys.readouterr().err
