"""The JSON file of a data set."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron.core.datasets.description import DatasetDescription, file_sha256, read_description

TOKENIZER = {"type": "SentencePiece", "vocab_size": 32000, "eod": 2, "bos": 1, "sha256": {"tokenizer.model": "ab" * 32}}
DESCRIPTION = DatasetDescription(
    key="text", tokenizer=TOKENIZER, append_eod=True, append_bos=False, documents=3, tokens=70_000_000_000,
    dtype="uint16", sha256={"bin": "00" * 32, "idx": "11" * 32},
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_description(tmp_path / "a_text_document") is None
    DESCRIPTION.write(tmp_path / "a_text_document")
    assert read_description(tmp_path / "a_text_document") == DESCRIPTION
    assert [path.name for path in tmp_path.iterdir()] == ["a_text_document.json"]
    assert json.loads((tmp_path / "a_text_document.json").read_text())["tokenizer"] == TOKENIZER


def test_files_of_the_input_take_a_line_each(tmp_path: Path) -> None:
    files = [{"path": f'in/"files": [] {number}', "documents": number, "bytes": 9} for number in range(3)]
    description = replace(DESCRIPTION, input={"files": files, "files_not_listed": 2, "left_aside": {".txt": 1}})
    description.write(tmp_path / "a")
    assert read_description(tmp_path / "a") == description
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines if line.startswith('      {"path"')] == files


def test_the_first_version_is_read(tmp_path: Path) -> None:
    content = asdict(DESCRIPTION) | {"version": 1}
    del content["input"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_description(tmp_path / "a") == replace(DESCRIPTION, version=1)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 2}',
        json.dumps(asdict(DESCRIPTION) | {"version": 3}),
        json.dumps(asdict(DESCRIPTION) | {"input": 3}),
        json.dumps(asdict(DESCRIPTION) | {"tokenizer": 3}),
    ]
    + [json.dumps({k: v for k, v in asdict(DESCRIPTION).items() if k != "tokens"})]
    + [json.dumps(asdict(DESCRIPTION) | {"more": 1})],
)
def test_broken_descriptions_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_description(tmp_path / "a")


def test_unknown_fields_are_named_without_their_control_characters(tmp_path: Path) -> None:
    content = asdict(DESCRIPTION) | {"a\x1b[31m": 1, **{f"more{number}" + "x" * 300: 1 for number in range(50)}}
    del content["tokens"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"it lacks tokens; it has unknown fields 'a\\x1b\[31m', 'more0") as error:
        read_description(tmp_path / "a")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_differences_of_tokenizers_are_named() -> None:
    assert DESCRIPTION.tokenizer_differences(TOKENIZER) == []
    other = TOKENIZER | {"eod": 0, "vocab_size": 10, "sha256": {"tokenizer.model": "cd" * 32, "x": "1"}}
    assert DESCRIPTION.tokenizer_differences(other) == [
        "vocabulary size 32000 in the data, 10 here",
        "end-of-document id 2 in the data, 0 here",
        "tokenizer.model has SHA-256 abababababab in the data, cdcdcdcdcdcd here",
        "x has SHA-256 none in the data, 1 here",
    ]
    assert replace(DESCRIPTION, tokenizer={}).tokenizer_differences(TOKENIZER) != []


def test_the_checksum_is_of_the_whole_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_descriptions_need_no_torch() -> None:
    program = "import sys\nimport megatron.core.datasets.description\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
