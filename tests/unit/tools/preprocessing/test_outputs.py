"""A run replaces nothing that it reads or has not written, and reads a file once, whatever names it has."""

import json
import os
import socket
from pathlib import Path

import pytest
from preprocessing_testing import arguments, outputs

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tools import preprocess_data
from tools.preprocessing.inputs import find_inputs

GOOD = b'{"text": "1"}\n{"text": "2"}\n'
MADE = ["text_document.bin", "text_document.idx", "text_document.json", "quarantine.jsonl", "resume.json"]


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("how", ["named", "linked", "another"])
def test_what_this_tool_has_not_written_is_not_replaced(tmp_path: Path, made: str, how: str, capsys) -> None:
    """Such as the lines of a quarantine, mended in place."""
    source, there = tmp_path / "in.jsonl", tmp_path / f"out_{made}"
    source.write_bytes(GOOD)
    if how == "named":
        source = there
    if how == "linked":
        os.link(source, there)
    else:
        there.write_bytes(GOOD)
    if how == "another" and made.endswith("bin"):  # which may be any data set's
        return
    assert preprocess_data.main(arguments(source, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert f"{there}" in error and ("is an input" if how != "another" else "is not from this tool") in error
    assert outputs(tmp_path / "out") == {f"_{made}": GOOD}


def test_a_folder_in_the_place_of_an_output_is_named_before_anything_is_read(tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "out_text_document.idx").mkdir()
    assert preprocess_data.main(arguments(tmp_path / "in.jsonl", tmp_path / "out")) == 1
    assert "out_text_document.idx, where this run writes, is not a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*out*")] == ["out_text_document.idx"]


def test_what_an_earlier_run_wrote_is_replaced(tmp_path: Path) -> None:
    for lines in (GOOD + b"bad\n", GOOD[:14] + b"[]\n", GOOD):
        (tmp_path / "in.jsonl").write_bytes(lines)
        assert preprocess_data.main(arguments(tmp_path / "in.jsonl", tmp_path / "out", "--max-bad-fraction", "1")) == 0
        assert (tmp_path / "out_quarantine.jsonl").exists() == (lines != GOOD)
        assert IndexedDataset(tmp_path / "out_text_document").document_count == lines.count(b'"text"')


def test_a_file_with_several_names_is_read_once_and_that_is_said(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    os.link(folder / "a.jsonl", folder / "b.jsonl")
    (folder / "c.jsonl").symlink_to("b.jsonl")
    (folder / "copy.jsonl").write_bytes(GOOD)  # two files, even if they are equal
    assert preprocess_data.main(arguments(folder, tmp_path / "out")) == 0
    assert IndexedDataset(tmp_path / "out_text_document").document_count == 4
    assert "left aside: 2 links to files that are read under another name\n" in capsys.readouterr().out
    again = find_inputs([str(folder), f"{folder}/a.jsonl", f"{folder}/../in"])
    assert [Path(part.path).name for part in again.files] == ["a.jsonl", "copy.jsonl"] and again.other_names == 2


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_called_so(tmp_path: Path, kind: str, capsys) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    special = folder / "b.jsonl"
    if kind == "pipe":
        os.mkfifo(special)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.open(folder, os.O_RDONLY)
            made.bind(f"/proc/self/fd/{here}/b.jsonl")  # the name of a socket may only be short
            os.close(here)
    else:
        special.symlink_to("/dev/zero")
    assert preprocess_data.main(arguments(folder, tmp_path / "out")) == 1
    assert f"{special} is a pipe, socket or device, not a file" in capsys.readouterr().err
    assert preprocess_data.main(arguments(special, tmp_path / "out")) == 1
    assert "is a pipe or a device, but files are read more than once" in capsys.readouterr().err
    assert not outputs(tmp_path / "out")


def test_the_log_of_a_training_run_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    row = {"iteration": 1, "consumed_samples": 8, "lm_loss": 10.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"iteration": 1, "text": "1"}) + "\n")
    found = find_inputs([str(tmp_path)])
    assert [Path(part.path).name for part in found.files] == ["a.jsonl", "corpus.jsonl"] and found.products == 1
