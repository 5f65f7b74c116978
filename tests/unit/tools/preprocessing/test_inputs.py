"""Every kind of input gives the same documents, whatever it is cut into, and broken files are set aside."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tools import preprocess_data
from tools.preprocessing import inputs, reader
from tools.preprocessing.inputs import Input, find_inputs, share

DOCUMENTS = [{"text": " ".join(str((i * k) % 99) for k in range(i % 40 + 1)), "title": f"{i % 99}"} for i in range(400)]
LINES = [json.dumps(document) for document in DOCUMENTS]
TOKENS = [[int(token) for token in document["text"].split()] for document in DOCUMENTS]


def run(tmp_path: Path, *arguments: str, status: int = 0) -> list[list[int]]:
    command = ["--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    assert preprocess_data.main([*command, "--workers", "1", *arguments]) == status
    if status:
        assert not list(tmp_path.glob("out*"))
        return []
    indexed = IndexedDataset(tmp_path / "out_text_document")
    return [indexed[i].tolist() for i in range(len(indexed))]


def quarantined(tmp_path: Path) -> list[tuple[str, int, str]]:
    entries = map(json.loads, (tmp_path / "out_quarantine.jsonl").read_text().splitlines())
    return [(Path(entry["file"]).name, entry["line"], entry["reason"]) for entry in entries]


def write(path: Path, lines: list[str]) -> Path:
    """The lines in the form that the name asks for; compressed ones as two members or frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(line + "\n" for line in lines).encode()
    halves = content[: len(content) // 2], content[len(content) // 2 :]
    suffix = path.suffix.lower()
    if suffix in (".gz", ".bz2", ".xz"):
        content = b"".join(map({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress, halves))
    elif suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        content = b"".join(map(zstandard.ZstdCompressor().compress, halves))
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(list(map(json.loads, lines))), path, row_group_size=150)
        return path
    path.write_bytes(content)
    return path


SUFFIXES = [
    "jsonl", "json", "ndjson", "jsonlines", "JSONL", "jsonl.gz", "json.gz", "jsonl.GZ", "jsonl.zst", "ndjson.bz2",
    "jsonl.xz", "parquet", "PARQUET",
]  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [97, 1000, 1 << 20])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, suffix: str, size: int, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", size)
    source = write(tmp_path / f"a.{suffix}", LINES)
    assert run(tmp_path, "--input", str(source), "--json-keys", "text", "title") == TOKENS
    titles = IndexedDataset(tmp_path / "out_title_document")
    assert [titles[i].tolist() for i in range(len(titles))] == [[int(document["title"])] for document in DOCUMENTS]


def test_a_last_line_without_an_end_counts_in_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "1"}\n{"text": "2"}') + b"\0" * 512)
    assert run(tmp_path, "--input", str(tmp_path / "a.jsonl.gz")) == [[1], [2]]


def test_folders_links_globs_and_several_inputs(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    write(corpus / "10.jsonl", LINES[4:5])
    write(corpus / "2.jsonl.gz", LINES[1:2])
    write(corpus / "1" / "x.parquet", LINES[:1])
    write(corpus / ".hidden.jsonl", LINES[9:])
    write(corpus / ".cache" / "a.jsonl", LINES[9:])
    write(corpus / "notes.txt", LINES[9:])
    write(elsewhere / "deep" / "7.jsonl", LINES[2:3])
    write(elsewhere / "8.jsonl", LINES[3:4])
    (corpus / "3-folder").symlink_to(elsewhere / "deep")
    (corpus / "4.jsonl").symlink_to(elsewhere / "8.jsonl")
    (corpus / "1" / "loop").symlink_to(corpus)
    assert run(tmp_path, "--input", str(corpus)) == TOKENS[:5]
    again = ("--input", str(corpus / "*.jsonl"), str(corpus / "**" / "x.parquet"), "--input", str(corpus))
    assert run(tmp_path, *again) == [*TOKENS[3:5], TOKENS[0], *TOKENS[1:3]], "each file once, in the order named"


def test_folders_that_link_to_each_other_are_entered_once_whatever_the_pattern(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "top" / "1.jsonl", LINES[:1])
    write(tmp_path / "top" / "b" / "2.jsonl", LINES[1:2])
    write(tmp_path / "top" / "b" / "c" / "3.jsonl", LINES[2:3])
    (tmp_path / "top" / "a").symlink_to("b")
    for name in ("up", "again", "back"):  # three loops: 3 ** 40 paths for whoever follows all of them
        (tmp_path / "top" / "b" / name).symlink_to("..")
    names = ["top/1.jsonl", "top/a/2.jsonl", "top/a/c/3.jsonl"]
    walk = os.walk

    def walk_backwards(*arguments, **options) -> Iterator[tuple[str, list[str], list[str]]]:
        for path, folders, files in walk(*arguments, **options):
            folders.reverse()
            yield path, folders, files

    monkeypatch.chdir(tmp_path)
    for order in (walk, walk_backwards):  # the names must not depend on the order in which a folder is listed
        monkeypatch.setattr(os, "walk", order)
        for pattern in ("top", "top/**", "**", "**/*.jsonl", "top/**/[1-3].jsonl", "t*/**/**/*.jsonl"):
            assert [part.path for part in find_inputs([pattern]).files] == names, pattern
        assert [part.path for part in find_inputs([f"{tmp_path}/**/c/*"]).files] == [f"{tmp_path}/top/a/c/3.jsonl"]


def test_a_link_to_nothing_is_refused(tmp_path: Path, capsys) -> None:
    write(tmp_path / "in" / "1.jsonl", LINES)
    (tmp_path / "in" / "2.jsonl").symlink_to(tmp_path / "gone")
    run(tmp_path, "--input", str(tmp_path / "in"), status=1)
    assert "in/2.jsonl is a link to nothing" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "jsonl.bz2", "jsonl.xz", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_the_rest_of_a_broken_file_is_set_aside(tmp_path: Path, suffix: str, damage: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 500)
    if suffix == "jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        compressed = zstandard.ZstdCompressor(write_checksum=True).compress("\n".join(LINES).encode())
    else:
        compressed = write(tmp_path / f"in/1.{suffix}", LINES).read_bytes()
    middle = len(compressed) * 3 // 4
    broken = compressed[:middle] if damage == "cut" else compressed[:middle] + b"\xff" * 40 + compressed[middle + 40 :]
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / f"in/1.{suffix}").write_bytes(broken)
    write(tmp_path / "in/2.jsonl", LINES)
    allow = ("--input", str(tmp_path / "in"), "--max-bad-fraction", "1", "--allow-damaged-files")
    documents = run(tmp_path, *allow)
    kept = len(documents) - 400
    assert documents == TOKENS[:kept] + TOKENS, "whole documents, up to where the file breaks off"
    assert kept > 100 or (suffix, damage) != ("jsonl.gz", "cut")
    assert quarantined(tmp_path)[-1] == (f"1.{suffix}", kept + 1, "broken file")
    if suffix != "parquet":
        return
    for path in tmp_path.glob("out*"):
        path.unlink()
    assert preprocess_data.main([
        "--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "NullTokenizer",
        "--vocab-size", "100", "--workers", "1", "--max-bad-fraction", "0.01",
    ]) == 1  # fmt: skip
    assert "of the input is bad (broken file 1;" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*.idx"))


def test_values_of_parquet_that_are_no_text_are_set_aside(tmp_path: Path, capsys) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["1", None, "2"], "raw": [b"3", b"\xff", b"4"], "number": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    allow = ("--input", str(tmp_path / "a.parquet"), "--max-bad-fraction", "0.5")
    assert run(tmp_path, *allow) == [[1], [2]]
    assert quarantined(tmp_path) == [("a.parquet", 2, "not a string")]
    run(tmp_path, *allow, "--json-keys", "text", "raw")
    raw = IndexedDataset(tmp_path / "out_raw_document")
    assert [raw[i].tolist() for i in range(len(raw))] == [[3], [4]]
    for path in tmp_path.glob("out*"):
        path.unlink()
    capsys.readouterr()
    run(tmp_path, *allow, "--json-keys", "body", status=1)
    assert "a.parquet has no column 'body'; its columns are 'text', 'raw', 'number'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_endless_lines_are_left_out(tmp_path: Path, suffix: str, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(reader, "LONGEST_LINE", 20_000)
    endless = json.dumps({"text": "1 " * 30_000})
    for lines in ([*LINES[:3], endless, *LINES[3:6]], [endless, *LINES[:6]], [*LINES[:6], endless]):
        source = write(tmp_path / f"a.{suffix}", lines)
        assert run(tmp_path, "--input", str(source), "--max-bad-fraction", "1") == TOKENS[:6]
        assert quarantined(tmp_path) == [(f"a.{suffix}", lines.index(endless) + 1, reader.TOO_LONG)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 50])
def test_shares_are_the_whole_in_order(tmp_path: Path, ranks: int, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 100)
    for number, size in enumerate((1234, 0, 10, 99, 100, 101, 5000)):
        (tmp_path / f"{number}.jsonl").write_bytes(b"x" * size)
    (tmp_path / "8.jsonl.gz").write_bytes(b"\x1f\x8b\x08" + b"x" * 697)
    (tmp_path / "9.parquet").write_bytes(b"x" * 300)
    whole = find_inputs([str(tmp_path)]).files
    parts = [part for rank in range(ranks) for part in share(whole, rank, ranks)]
    joined: list[Input] = []
    for part in parts:
        if joined and joined[-1].path == part.path:
            assert joined[-1].end == part.start and part.start % 100 == 0 and part.is_plain
            joined[-1] = joined[-1]._replace(end=part.end)
        else:
            joined.append(part)
    assert [part for part in joined if part.size] == [part for part in whole if part.size]
    assert os.path.getsize(tmp_path / "6.jsonl") == 5000
