"""What counts as input, what is left aside, and how much of a corpus a broken file withheld."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest
from preprocessing_testing import arguments, outputs

from megatron.core.datasets.description import read_description
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tools import preprocess_data
from tools.preprocessing import inputs, part
from tools.preprocessing.inputs import find_inputs, natural_order
from tools.preprocessing.kinds import foreign, is_product

GOOD = b'{"text": "1"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3000\n"
HTML = b"\n<!DOCTYPE html>\n<html><body>404</body></html>\n"


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def run(tmp_path: Path, *more: str, status: int = 0) -> dict:
    """What the description says of the input, after a run over tmp_path/in; files not listed have one document each."""
    command = arguments(tmp_path / "in", tmp_path / "out", *more)
    assert preprocess_data.main(command) == status
    if status:
        assert not list(tmp_path.glob("out*.idx"))
        return {}
    description = read_description(tmp_path / "out_text_document")
    assert description is not None and description.input is not None
    listed = sum(file["documents"] for file in description.input["files"])
    assert listed == description.documents - description.input["files_not_listed"]
    return description.input


def rows(record: dict) -> dict[str, tuple[int, ...]]:
    """Documents, bytes, bad lines and lost bytes by file name."""
    return {
        Path(row["path"]).name: (row["documents"], row["bytes"], row.get("bad_lines", 0), row.get("lost_bytes", 0))
        for row in record["files"]
    }


ALLOW = "--allow-damaged-files"
COMPRESSIONS = {"plain": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.ZST", "a.ndjson.bz2", "a.jsonlines.xz", "a.parquet"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_content_says_how_a_file_is_read(tmp_path: Path, name: str, compression: str) -> None:
    content = COMPRESSIONS[compression](GOOD * 50)
    put(tmp_path / "in" / name, content)
    assert rows(run(tmp_path)) == {name: (50, len(content), 0, 0)}


def tar_of(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


FOREIGN = {
    "lfs.jsonl": (POINTER, "git lfs pull", 3000),
    "lfs.parquet": (POINTER, "git lfs pull", 3000),
    "page.jsonl": (HTML, "HTML page", len(HTML)),
    "page.jsonl.gz": (HTML, "HTML page", len(HTML)),
    "inner.jsonl.gz": (gzip.compress(HTML, mtime=0), "HTML page", None),
    "error.jsonl": (b'<?xml version="1.0"?><Error/>', "XML document", 29),
    "tar.jsonl": (tar_of(GOOD), "tar archive", 10240),
    "tar.jsonl.gz": (gzip.compress(tar_of(GOOD), mtime=0), "tar archive", None),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(GOOD)), "gzip within another compression", None),
    "binary.jsonl": (bytes(range(256)) * 9, "binary data", 2304),
    "wide.jsonl": ('{"text": "1"}\n'.encode("utf-16"), "UTF-16", 30),
    "text.parquet": (b"PAX1 and no more", "cannot be read", 16),
    "all_bad.jsonl": (b"bad\n\n\nbad", "none of its 4 lines could be used", 7),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_give_nothing_count_whole_and_are_named(tmp_path: Path, name: str, capsys) -> None:
    content, what, lost = FOREIGN[name]
    lost = lost or len(content)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    put(tmp_path / "in" / name, content)
    put(tmp_path / "in" / "good.jsonl", GOOD * 30)
    total = len(GOOD) * 30 + max(lost, len(content) - 2 * (name == "all_bad.jsonl"))
    run(tmp_path, ALLOW, "--max-bad-fraction", f"{lost / total - 1e-4:.4f}", status=1)
    error = capsys.readouterr().err
    assert name in error and what in error
    assert f"{100 * lost / total:.3g}% of the input is bad" in error
    allowed = f"{lost / total + 1e-4:.4f}"
    run(tmp_path, "--max-bad-fraction", allowed, status=1)
    error = capsys.readouterr().err
    assert "error: 1 of 2 files ended early or gave nothing" in error and error.count(what) >= 2
    record = run(tmp_path, ALLOW, "--max-bad-fraction", allowed, "--resume")
    assert rows(record)[name] == (0, len(content), 2 if name == "all_bad.jsonl" else 1, lost)
    assert [what in row["trouble"] for row in record["files"] if "trouble" in row] == [True]
    line = next(line for line in capsys.readouterr().out.splitlines() if f"/{name}: " in line)
    assert what in line and "0 documents" in line


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz"])
def test_a_small_file_with_one_flipped_byte_counts_whole(tmp_path: Path, compression: str) -> None:
    content = bytearray(COMPRESSIONS[compression](b"".join(b'{"text": "%d"}\n' % (i * i % 99) for i in range(2000))))
    content[len(content) // 2] ^= 0xFF
    put(tmp_path / "in" / "a.jsonl.gz", bytes(content))
    put(tmp_path / "in" / "b.jsonl", GOOD * 100)
    run(tmp_path, ALLOW, "--max-bad-fraction", "0.1", status=1)
    assert rows(run(tmp_path, ALLOW, "--max-bad-fraction", "1"))["a.jsonl.gz"] == (0, len(content), 1, len(content))


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_of_a_file_that_breaks_off_what_is_behind_the_last_document_counts(tmp_path: Path, size: int, monkeypatch):
    """Stored without compression, so that the place of a document in the file is known."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", size)
    lines = b"".join(b'{"text": "%06d"}\n' % (i % 99) for i in range(5000))
    whole = gzip.compress(lines, compresslevel=0)
    broken = whole[:60_000] + b"\xff" * 20_000
    put(tmp_path / "in" / "a.jsonl.gz", broken)
    record = run(tmp_path, ALLOW, "--max-bad-fraction", "1")
    documents, total, bad, lost = rows(record)["a.jsonl.gz"]
    assert (total, bad) == (80_000, 1)
    assert abs(total - lost - documents * 19) < 100, "bytes in use are those of the documents"
    assert 40_000 < documents * 19 <= 60_000
    assert "the rest of this file cannot be read" in record["files"][0]["trouble"]


LINES = b"".join(b'{"text": "%d"}\n' % (i * i % 99) for i in range(20_000))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused_however_little_seems_to_be_lost(
    tmp_path: Path, compression: str, share: float, capsys
) -> None:
    content = COMPRESSIONS[compression](LINES)
    end = max(int(len(content) * share), 20)
    while compression == "plain" and content[end - 1 : end] in (b"\n", b"}"):
        end -= 1
    put(tmp_path / "in" / "a.jsonl", content[:end])
    put(tmp_path / "in" / "b.jsonl", LINES)
    run(tmp_path, "--max-bad-fraction", "1", status=1)
    what = "it ends in the middle of a line" if compression == "plain" else "cannot be read"
    error = capsys.readouterr().err
    assert "a.jsonl: " in error.splitlines()[-1] and what in error.splitlines()[-1] and "b.jsonl: " in error
    record = run(tmp_path, "--max-bad-fraction", "1", ALLOW)
    assert [what in row.get("trouble", "") for row in record["files"]] == [True, False]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.ZST", "a.parquet"])
def test_what_is_never_empty_is_damaged_if_it_is(tmp_path: Path, name: str, capsys) -> None:
    put(tmp_path / "in" / name, b"")
    put(tmp_path / "in" / "b.jsonl", GOOD)
    run(tmp_path, "--max-bad-fraction", "1", status=1)
    assert f"{name}: an empty file" in capsys.readouterr().err


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz"])
def test_padding_around_members_is_no_damage(tmp_path: Path, compression: str) -> None:
    content = COMPRESSIONS[compression](GOOD * 9)
    put(tmp_path / "in" / "a.jsonl.gz", content + bytes(100_000) + content + bytes(40_000))
    record = run(tmp_path)
    assert record["files"][0]["documents"] == 18 and "trouble" not in record["files"][0]


def test_nothing_is_missing_from_a_file_without_content(tmp_path: Path) -> None:
    for name, content in {"a": b"", "b": b"\n\n", "c": GOOD, "d": b'{"text": ""}\n', "e": GOOD + GOOD.strip()}.items():
        put(tmp_path / "in" / f"{name}.jsonl", content)
    assert [row["documents"] for row in run(tmp_path)["files"]] == [0, 0, 1, 0, 2]


def test_bad_lines_of_compressed_files_count_by_their_share(tmp_path: Path) -> None:
    content = gzip.compress(GOOD * 30 + b"bad1\nbad2\n" * 14)
    put(tmp_path / "in" / "a.jsonl.gz", content)
    record = run(tmp_path, "--max-bad-fraction", "1")
    assert rows(record)["a.jsonl.gz"] == (30, len(content), 28, -(-len(content) * 140 // 560))


def test_own_products_are_never_input(tmp_path: Path, capsys) -> None:
    """Of this prefix and of others, under any name, in a folder, by glob and by the shell; twice the same bytes."""
    folder = tmp_path / "in"
    put(folder / "a.jsonl", GOOD * 30 + b"bad\n")
    assert preprocess_data.main(arguments(folder, folder / "other")) == 0
    (folder / "other_quarantine.jsonl").rename(folder / "list.jsonl")
    put(folder / "x_text_document.bin.tmp", b"")
    put(folder / "x_rank00000of00002_status.json", b'{"state": "working", "run": "' + b"0f" * 16 + b'", "beat": 3}')
    put(folder / "x_resume.json", b'{"version": 2, "fingerprint": "0f", "writers": []}')
    capsys.readouterr()
    first = None
    for source in ([str(folder)], [str(folder / "*")], sorted(map(str, folder.iterdir()))):
        command = arguments(folder, folder / "enc")
        command[1:2] = source
        assert preprocess_data.main(command) == 0
        assert "files that these tools wrote" in capsys.readouterr().out
        assert [Path(file.path).name for file in find_inputs(source).files] == ["a.jsonl"]
        first = first or outputs(folder / "enc")
        assert outputs(folder / "enc") == first
    assert preprocess_data.main(arguments(folder / "list.jsonl", tmp_path / "out")) == 1
    assert "nothing but files that this tool wrote itself" in capsys.readouterr().err
    assert is_product(b'{"file": "a.jsonl", "line": 3, "reason": "bad UTF-8"}\n')
    for corpus in (
        b'{"file": "a", "line": 3, "reason": "x", "text": "1"}',
        b'{"state": "CA", "run": "fast", "text": "1"}',
    ):
        assert not is_product(corpus), "lines of a corpus that begin in the same way"


def test_the_rest_of_a_folder_is_reported_by_ending(tmp_path: Path, capsys) -> None:
    put(tmp_path / "in" / "a.jsonl", GOOD)
    for name in ("README.md", "b.TXT", "c.txt", "d.tar.gz", "LICENSE", ".hidden"):
        put(tmp_path / "in" / name, GOOD)
    record = run(tmp_path)
    assert record["left_aside"] == {".txt": 2, ".md": 1, ".tar.gz": 1, "no ending": 1}
    assert "left aside: 5 files of other kinds (.txt 2, .md 1, .tar.gz 1, no ending 1)" in capsys.readouterr().out
    assert len(find_inputs([str(tmp_path / "in" / "c.txt")]).files) == 1, "named, it is read"
    assert len(find_inputs([str(tmp_path / "in" / "*")]).files) == 1
    assert len(find_inputs([str(tmp_path / "in" / "*.txt")]).files) == 1


def test_the_order_of_files_is_total() -> None:
    ordered = ["001.jsonl", "01.jsonl", "1.jsonl", "2.jsonl", "10.jsonl", "10²3.jsonl", "a4", "a²", "a³"]
    for names in (ordered, ordered[::-1]):
        assert sorted(names, key=natural_order) == ordered
    assert natural_order(os.fsdecode(b"\xff1")) < natural_order(os.fsdecode(b"\xff2"))


@pytest.mark.parametrize("compressed", [False, True])
def test_blank_lines_are_counted_and_keep_the_numbers_of_others(tmp_path: Path, compressed: bool, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 100)
    content = b"\n \t\n" + GOOD + b"\n" * 997 + b"bad\r\n\r\n\r\n" + GOOD * 99 + b"  \nbad"
    name = "a.jsonl.gz" if compressed else "a.jsonl"
    put(tmp_path / "in" / name, gzip.compress(content) if compressed else content)
    record = run(tmp_path, "--max-bad-fraction", "1")
    row = record["files"][0]
    assert (row["documents"], row["bad_lines"]) == (100, 2)
    entries = [json.loads(line) for line in (tmp_path / "out_quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [1001, 1104]
    if not compressed:
        assert row["lost_bytes"] == len(b"bad\r\n") + len(b"bad")


def test_many_lines_with_the_same_fault_are_one_entry(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jsonl", GOOD + b"x\n" * 1500 + GOOD + b"\nx\n" * 3 + b"[1]\n" * 1000 + b"x\n" * 999)
    record = run(tmp_path, "--max-bad-fraction", "1")
    row = record["files"][0]
    assert (row["documents"], row["bad_lines"], row["lost_bytes"]) == (2, 3502, 2 * 1500 + 2 * 3 + 4 * 1000 + 2 * 999)
    entries = [json.loads(line) for line in (tmp_path / "out_quarantine.jsonl").read_text().splitlines()]
    found = [(entry["line"], entry.get("lines", 1)) for entry in entries]
    assert found[:5] == [(2, 1500), (1504, 1), (1506, 1), (1508, 1), (1509, 1000)]
    assert found[5:] == [(line, 1) for line in range(2509, 2509 + 999)]


def test_equal_lines_that_are_no_documents_are_parsed_once_a_block(tmp_path: Path, monkeypatch, capsys) -> None:
    lines = []
    parse = preprocess_data.preprocess.__globals__["read_documents"].__globals__["texts_of_line"]
    monkeypatch.setattr(
        "tools.preprocessing.worker.texts_of_line", lambda line, keys: lines.append(line) or parse(line, keys)
    )
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1 << 30)
    put(tmp_path / "in" / "a.jsonl", GOOD + b"\n" * 3_000_000 + GOOD + b"x\n \t\r\n[]\n" * 90_000)
    run(tmp_path, "--max-bad-fraction", "1")
    assert sorted(lines) == sorted([GOOD.strip(), GOOD.strip(), b"", b"x", b" \t\r", b"[]"])
    assert "skipped 3090000 blank lines" in capsys.readouterr().out


def test_the_list_of_bad_lines_stays_short(tmp_path: Path) -> None:
    """After 10,000 in a block they are listed by reason; counts and bytes stay exact."""
    put(tmp_path / "in" / "a.jsonl", GOOD + b"x\n\n[]\n" * 20_000 + GOOD + b'{"a":1}\n' * 7 + b"x")
    row = run(tmp_path, "--max-bad-fraction", "1")["files"][0]
    assert (row["documents"], row["bad_lines"]) == (2, 40_008)
    assert row["lost_bytes"] == 5 * 20_000 + 7 * len(b'{"a":1}\n') + 1
    entries = [json.loads(line) for line in (tmp_path / "out_quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries[:4]] == [2, 4, 5, 7] and len(entries) == 10_003
    others = [(entry["line"], entry["reason"], entry["lines"]) for entry in entries[10_000:]]
    first = 2 + 3 * 5000
    counts = [(first, "invalid JSON", 15_001), (first + 2, "not an object", 15_000), (60_003, "missing key", 7)]
    assert others == counts


def test_too_much_that_is_bad_ends_the_run_on_the_way(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(part, "SECONDS_BETWEEN_JOURNALS", 0.0)
    put(tmp_path / "in" / "a.jsonl", GOOD * 100)
    put(tmp_path / "in" / "b.jsonl", b"x\n" * 2000 + GOOD * 200)
    put(tmp_path / "in" / "c.jsonl", GOOD * 100)
    run(tmp_path, status=1)
    error = capsys.readouterr().err
    assert "of the input is bad after 0.0 of 0.0 MB, which end in" in error and "b.jsonl (invalid JSON " in error
    assert not (tmp_path / "out_text_document.idx").exists()
    run(tmp_path, "--resume", "--max-bad-fraction", "0.9")
    resumed = sorted((tmp_path / name).read_bytes() for name in ("out_text_document.bin", "out_quarantine.jsonl"))
    run(tmp_path, "--max-bad-fraction", "0.9")
    whole = sorted((tmp_path / name).read_bytes() for name in ("out_text_document.bin", "out_quarantine.jsonl"))
    assert resumed == whole


def test_windows_of_zstd_are_limited(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    for log in (27, 28):
        parameters = zstandard.ZstdCompressionParameters(window_log=log, compression_level=1)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        put(tmp_path / "in" / f"{log}.jsonl.zst", compressor.compress(GOOD * 9) + compressor.flush())
    record = run(tmp_path, ALLOW, "--max-bad-fraction", "1")
    assert [row["documents"] for row in record["files"]] == [9, 0]
    assert "a window of more than 128 MiB" in record["files"][1]["trouble"]


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_bad_utf8_in_a_column_of_strings_is_a_bad_line(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([b"1", b"\xff", b"3"])
    offsets, data = raw.buffers()[1:]
    column = pyarrow.StringArray.from_buffers(3, offsets, data)
    if kind == "large_string":
        column = column.cast(pyarrow.large_string())
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in" / "a.parquet")
    row = run(tmp_path, "--max-bad-fraction", "0.5")["files"][0]
    assert (row["documents"], row["bad_lines"], row["lost_bytes"]) == (2, 1, -(-row["bytes"] // 3))
    indexed = IndexedDataset(tmp_path / "out_text_document")
    assert [indexed[i].tolist() for i in range(len(indexed))] == [[1, 99], [3, 99]]
    entry = json.loads((tmp_path / "out_quarantine.jsonl").read_text())
    assert (entry["line"], entry["reason"]) == (2, "bad UTF-8")


def test_a_prefix_that_is_too_long_is_a_sentence(tmp_path: Path, capsys) -> None:
    put(tmp_path / "in" / "a.jsonl", GOOD)
    for name in ("x" * 240, "é" * 110, "y/" * 2100 + "z"):
        with pytest.raises(SystemExit) as exit_:
            preprocess_data.main(arguments(tmp_path / "in", tmp_path / name))
        assert exit_.value.code == 2
        assert "longer than names may be" in capsys.readouterr().err.splitlines()[-1]


def test_the_list_of_files_is_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tools.preprocessing.statistics._LISTED_IN_DESCRIPTION", 3)
    for number in range(6):
        put(tmp_path / "in" / f"{number}.jsonl", GOOD if number != 4 else b"")
    record = run(tmp_path)
    assert [Path(row["path"]).name for row in record["files"]] == ["0.jsonl", "1.jsonl", "4.jsonl"]
    assert record["files"][2]["trouble"] == "empty" and record["files_not_listed"] == 3


def test_zeros_before_good_lines_are_no_binary_file() -> None:
    assert foreign(b"\0" * 4096) is None and foreign(b"\0" * 400 + b"\n" + GOOD) is None
