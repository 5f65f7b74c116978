"""tools/merge_datasets.py: one data set with the documents of several, in order."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.description import Origin, file_sha256, read_description
from megatron.core.datasets.indexed_dataset import CODES, HEADER, MAGIC, IndexedDataset
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from tools import merge_datasets

ORIGIN = Origin("text", {"type": "NullTokenizer", "vocab_size": 100, "eod": 99, "bos": None}, True, False)


def make(prefix: Path, documents: list[list[int]], origin: Origin | None = ORIGIN, dtype: str = "<u2") -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize(origin)
    return str(prefix)


def test_documents_of_a_folder_follow_in_natural_order(tmp_path: Path) -> None:
    parts = {10: [[5]], 2: [[3, 4], []], 1: [[1], [2, 2, 2]]}
    for number, documents in parts.items():
        make(tmp_path / "in" / f"p{number}", documents)
    assert merge_datasets.main(["--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "all")]) == 0
    merged = IndexedDataset(tmp_path / "all")
    assert [merged[i].tolist() for i in range(len(merged))] == [[1], [2, 2, 2], [3, 4], [], [5]]
    assert merged.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    together = make(tmp_path / "together", [[1], [2, 2, 2], [3, 4], [], [5]])
    for end in ("bin", "idx"):
        assert (tmp_path / f"all.{end}").read_bytes() == Path(f"{together}.{end}").read_bytes()
    description = read_description(tmp_path / "all")
    assert description is not None and replace(description, merged_from=()) == read_description(together)
    assert description.sha256 == {end: file_sha256(tmp_path / f"all.{end}") for end in ("bin", "idx")}


def test_refusals_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make(tmp_path / "a", [[1]])
    others = {
        "differ in their append_eod": make(tmp_path / "b", [[1]], ORIGIN._replace(append_eod=False)),
        "differ in their tokenizer": make(tmp_path / "c", [[1]], ORIGIN._replace(tokenizer={"eod": 3})),
        "its tokens are int32": make(tmp_path / "d", [[1]], ORIGIN, "<i4"),
        "e.idx does not exist": str(tmp_path / "e"),
        "is one of the inputs": str(tmp_path / "out"),
        "f.bin has changed": make(tmp_path / "f", [[1, 2, 3]]),
        "has no data sets": str(tmp_path / "empty"),
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "f.bin").write_bytes(np.array([1, 2, 4], "<u2").tobytes())
    for message, other in others.items():
        assert merge_datasets.main(["--input", a, other, "--output-prefix", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))


def test_a_data_set_from_elsewhere_is_merged_without_a_description(tmp_path: Path, capsys) -> None:
    command = ["--input", make(tmp_path / "a", [[1]]), make(tmp_path / "b", [[2]], None), "--output-prefix"]
    assert merge_datasets.main([*command, str(tmp_path / "out")]) == 0
    assert "has no description" in capsys.readouterr().err
    assert len(IndexedDataset(tmp_path / "out")) == 2 and not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Two sparse data sets of 3 GiB each, of which the last document is not empty; their sum is on disk for a while."""
    size = 3 << 30
    for name, last in (("a", [1, 2]), ("b", [3, 4])):
        lengths = np.array([size // 4 - 1, size // 4 - 1, 2], "<i4")
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(size)
            file.seek(size - 4)
            file.write(np.array(last, "<u2").tobytes())
        offsets = np.array([0, size // 2 - 2, size - 4], "<i8")
        header = HEADER.pack(MAGIC, 1, CODES[np.dtype("<u2")], 3, 4)
        index = header + lengths.tobytes() + offsets.tobytes() + np.arange(4, dtype="<i8").tobytes()
        (tmp_path / f"{name}.idx").write_bytes(index)
    try:
        inputs = [str(tmp_path / "a"), str(tmp_path / "b")]
        assert merge_datasets.main(["--input", *inputs, "--output-prefix", str(tmp_path / "all")]) == 0
        merged = IndexedDataset(tmp_path / "all")
        assert merged.token_count == size and merged.document_count == 6
        assert [merged[i].tolist() for i in (2, 5)] == [[1, 2], [3, 4]]
        assert merged.get_document(4, size // 4 - 3).tolist() == [0, 0]
        raw = (tmp_path / "all.idx").read_bytes()[HEADER.size + 24 : HEADER.size + 72]
        expected = [0, size // 2 - 2, size - 4, size, size + size // 2 - 2, 2 * size - 4]
        assert np.frombuffer(raw, "<i8").tolist() == expected
    finally:
        (tmp_path / "all.bin").unlink(missing_ok=True)


def test_results_of_earlier_merges_and_sets_named_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, b = (make(tmp_path / name, [[1, 99], [2, 99]]) for name in "ab")
    assert merge_datasets.main(["--input", str(tmp_path), "--output-prefix", str(tmp_path / "all")]) == 0
    assert merge_datasets.main(["--input", str(tmp_path), "--output-prefix", str(tmp_path / "again")]) == 0
    assert f"left out {tmp_path / 'all'}: it was merged from a, b" in capsys.readouterr().err
    assert IndexedDataset(tmp_path / "again").document_count == 4
    description = read_description(tmp_path / "again")
    assert description is not None and tuple(description.merged_from) == ("a", "b")
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("a*.*"):
        file.rename(tmp_path / "moved" / file.name)
    assert merge_datasets.main(["--input", str(tmp_path / "moved"), "--output-prefix", str(tmp_path / "c")]) == 0
    assert IndexedDataset(tmp_path / "c").document_count == 10, "a result is a source where its own sources are not"
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (b, f"{tmp_path}/./b", f"{tmp_path}/link/b", f"{b}.bin"):
        assert merge_datasets.main(["--input", b, other, "--output-prefix", str(tmp_path / "twice")]) == 1
        assert "twice: name it once" in capsys.readouterr().err


def link(prefix: Path, target: str, how: str) -> str:
    for end in ("bin", "idx", "json"):
        if how == "symlink":
            Path(f"{prefix}.{end}").symlink_to(f"{target}.{end}")
        else:
            os.link(f"{target}.{end}", f"{prefix}.{end}")
    return str(prefix)


@pytest.mark.parametrize("how", ["symlink", "hard link"])
def test_links_to_the_files_of_a_set_are_that_set(tmp_path: Path, how: str, capsys) -> None:
    a, b = (make(tmp_path / name, [[number], [number]]) for number, name in enumerate("ab"))
    linked = link(tmp_path / "linked", a, how)
    for command in ([a, linked], [str(tmp_path)]):
        assert merge_datasets.main(["--input", *command, "--output-prefix", str(tmp_path / "out")]) == 1
        assert f"names {a} (also as {linked}) twice: name it once" in capsys.readouterr().err
    before = Path(f"{a}.bin").read_bytes()
    (tmp_path / "here").symlink_to(tmp_path)
    for output in (linked, f"{tmp_path}/here/a", f"{a}.bin"):
        assert merge_datasets.main(["--input", a, b, "--output-prefix", output]) == 1
        assert "is one of the inputs" in capsys.readouterr().err
    assert Path(f"{a}.bin").read_bytes() == before and len(IndexedDataset(a)) == 2


def test_documents_that_will_be_there_twice_are_told(tmp_path: Path, capsys) -> None:
    a, b = (make(tmp_path / name, [[number], [number]]) for number, name in enumerate("ab"))
    copy = str(tmp_path / "copy")
    for end in ("bin", "idx", "json"):
        shutil.copy(f"{a}.{end}", f"{copy}.{end}")
    said = {
        f"warning: {copy} has the same tokens as {a}": [a, copy],
        f"warning: {tmp_path}/ab was merged from a, which will be there twice": [f"{tmp_path}/ab", a],
        f"note: {tmp_path}/ab was itself merged from a, b": [f"{tmp_path}/ab", make(tmp_path / "c", [[7]])],
        "1 of 2": [a, b],
    }
    assert merge_datasets.main(["--input", a, b, "--output-prefix", str(tmp_path / "ab")]) == 0
    capsys.readouterr()
    for sentence, sources in said.items():
        assert merge_datasets.main(["--input", *sources, "--output-prefix", str(tmp_path / "out")]) == 0
        error = capsys.readouterr().err
        assert sentence in error and error.count("warning") + error.count("note") == (sentence[0] != "1")


def test_the_output_may_be_named_like_a_file_but_not_like_a_folder(tmp_path: Path, capsys) -> None:
    a = make(tmp_path / "a", [[1]])
    assert merge_datasets.main(["--input", f"{a}.json", "--output-prefix", str(tmp_path / "out.bin")]) == 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json"]
    for folder in (f"{tmp_path}/", f"{tmp_path}/.", f"{tmp_path}/new/"):
        assert merge_datasets.main(["--input", a, "--output-prefix", folder]) == 1
        assert "is a folder: add the beginning of the files' names" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 6
