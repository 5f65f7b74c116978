"""The indexed format: our files parsed by hand, files made by hand read by us, torn files refused, aborts clean."""

import copy
import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.core.atomic_files import atomic_writer, sync_folder
from megatron.core.datasets.indexed_dataset import IndexedDataset, optimal_dtype
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter

MAGIC = b"MMIDIDX\x00\x00"
CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12]]


def index_by_hand(code: int, lengths: list[int], documents: list[int]) -> bytes:
    itemsize = np.dtype(CODES[code]).itemsize
    offsets = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    return (
        MAGIC
        + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *offsets)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize()
    return prefix


@pytest.mark.parametrize(("dtype", "code"), [("uint16", 8), ("int32", 4)])
def test_written_bytes_are_the_format(tmp_path: Path, dtype: str, code: int) -> None:
    write(tmp_path / "a", DOCUMENTS, dtype)
    tokens = [token for document in DOCUMENTS for token in document]
    assert (tmp_path / "a.idx").read_bytes() == index_by_hand(code, [3, 1, 0, 4], [0, 1, 2, 3, 4])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack(f"<{len(tokens)}{'H' if code == 8 else 'i'}", *tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("code", sorted(CODES))
def test_files_made_by_hand_are_read(tmp_path: Path, code: int) -> None:
    """Two documents, the first of two sequences and the second of one, then one without any."""
    (tmp_path / "a.idx").write_bytes(index_by_hand(code, [2, 1, 3], [0, 2, 3, 3]))
    (tmp_path / "a.bin").write_bytes(np.arange(1, 7).astype(CODES[code]).tobytes())
    indexed = IndexedDataset(tmp_path / "a")
    assert indexed.dtype == np.dtype(CODES[code]) and len(indexed) == 3 and indexed.token_count == 6
    assert [indexed[i].tolist() for i in range(3)] == [[1, 2], [3], [4, 5, 6]]
    assert indexed.get_document(1, 1).tolist() == [5, 6] and indexed.get_document(1, 1, 1).tolist() == [5]
    assert indexed.sequence_lengths.tolist() == [2, 1, 3]
    assert indexed.document_indices.tolist() == [0, 2, 3, 3]
    assert [indexed.get_document(i).tolist() for i in range(3)] == [[1, 2, 3], [4, 5, 6], []]
    assert indexed.get_document(0, 1, 2).tolist() == [2, 3]
    assert indexed.document_lengths(0, 3).tolist() == [3, 3, 0]
    assert indexed.document_lengths(1, 2).tolist() == [3]


def test_an_empty_data_set_is_read(tmp_path: Path) -> None:
    indexed = IndexedDataset(write(tmp_path / "a", []))
    assert len(indexed) == 0 and indexed.document_count == 0 and indexed.document_lengths(0, 0).tolist() == []


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a.idx", lambda raw: b"X" + raw[1:]),
        ("a.idx", lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:]),
        ("a.idx", lambda raw: raw[:17] + b"\x09" + raw[18:]),
        ("a.idx", lambda raw: raw[:17] + b"\x00" + raw[18:]),
        ("a.idx", lambda raw: raw[:17] + b"\x05" + raw[18:]),  # a wider type: offsets no longer fit
        ("a.idx", lambda raw: raw[:18] + struct.pack("<Q", 5) + raw[26:]),
        ("a.idx", lambda raw: raw[:26] + struct.pack("<Q", 4) + raw[34:]),
        ("a.idx", lambda raw: raw[:18] + struct.pack("<Q", 2**62) + raw[26:]),
        ("a.idx", lambda raw: raw[:34] + struct.pack("<i", 4) + raw[38:]),
        # A negative length that all other numbers agree with.
        (
            "a.idx",
            lambda raw: raw[:34] + struct.pack("<2i", -1, 5) + raw[42:58] + struct.pack("<q", -2) + raw[66:],
        ),
        ("a.idx", lambda raw: raw[:58] + struct.pack("<q", 8) + raw[66:]),  # an offset of a sequence
        ("a.idx", lambda raw: raw[:-40] + struct.pack("<q", 1) + raw[-32:]),  # documents do not start at 0
        ("a.idx", lambda raw: raw[:-8] + struct.pack("<q", 3)),  # and do not end at the last sequence
        ("a.idx", lambda raw: raw[:-32] + struct.pack("<q", 3) + raw[-24:]),  # and fall on the way
        ("a.idx", lambda raw: raw[:-1]),
        ("a.idx", lambda raw: raw + b"\x00"),
        ("a.idx", lambda raw: raw[:20]),
        ("a.idx", lambda raw: b""),
        ("a.bin", lambda raw: raw[:-1]),
        ("a.bin", lambda raw: raw + b"\x00\x00"),
        ("a.bin", lambda raw: b""),
    ],
)
def test_inconsistent_files_are_refused_by_name(tmp_path: Path, what: str, change) -> None:
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / what).write_bytes(change((tmp_path / what).read_bytes()))
    with pytest.raises(ValueError, match=what.replace(".", r"\.")):
        IndexedDataset(tmp_path / "a")


def test_missing_files_are_named_and_a_near_name_is_suggested(tmp_path: Path) -> None:
    write(tmp_path / "a_text_document", DOCUMENTS)
    with pytest.raises(FileNotFoundError, match=r"a\.idx does not exist; did you mean .*a_text_document\?"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a_text_document.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"a_text_document\.bin does not exist"):
        IndexedDataset(tmp_path / "a_text_document")


def test_merging_equals_writing_in_one_go(tmp_path: Path) -> None:
    write(tmp_path / "whole", [*DOCUMENTS, [1], *DOCUMENTS])
    write(tmp_path / "shard", DOCUMENTS)
    with IndexedDatasetWriter(tmp_path / "merged", "uint16") as writer:
        writer.add_file(tmp_path / "shard")
        writer.add_document([1])
        writer.add_file(tmp_path / "shard")
        writer.finalize()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    with IndexedDatasetWriter(tmp_path / "other", "int32") as writer, pytest.raises(ValueError, match="uint16"):
        writer.add_file(tmp_path / "shard")


def test_merging_keeps_documents_of_several_sequences(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(index_by_hand(8, [2, 1, 3], [0, 2, 3]))
    (tmp_path / "a.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    with IndexedDatasetWriter(tmp_path / "b", "uint16") as writer:
        writer.add_file(tmp_path / "a")
        writer.add_document([1])
        writer.add_file(tmp_path / "a")
        writer.finalize()
    assert IndexedDataset(tmp_path / "b").document_indices.tolist() == [0, 2, 3, 4, 6, 7]


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Three sequences of 2^30 int32 tokens; the file is sparse and takes no space."""
    lengths = [2**30] * 3
    (tmp_path / "a.idx").write_bytes(index_by_hand(4, lengths, [0, 1, 3]))
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(3 * 2**32)
        file.seek(2**33)
        file.write(struct.pack("<i", 77))
    indexed = IndexedDataset(tmp_path / "a")
    assert indexed[2][:1].tolist() == [77] and indexed.get_document(1, 2**30, 1).tolist() == [77]
    with pytest.raises(ValueError, match="too long"):
        indexed.document_lengths(0, 2)


@pytest.mark.parametrize("ids", [[65536], [-1], np.array([70000], np.int64)])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, ids) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer, pytest.raises(ValueError, match=str(ids[0])):
        writer.add_document(ids)


def test_leaving_by_an_exception_leaves_the_old_files_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_writer_leaves_no_data_set_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter\n"
        "writer = IndexedDatasetWriter(sys.argv[1], 'uint16')\n"
        "writer.add_document(range(60000))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "a"], check=False).returncode == -9
    assert not (tmp_path / "a.idx").exists() and not (tmp_path / "a.bin").exists()
    write(tmp_path / "a", DOCUMENTS)
    write(tmp_path / "b", DOCUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_an_index_is_never_next_to_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dying between the two renames of an overwrite must not leave the old index with the new tokens."""
    write(tmp_path / "a", DOCUMENTS)

    def dies_after_bin(source: str, target: str, rename=os.rename) -> None:
        if target.endswith(".idx"):
            raise OSError("power lost")
        rename(source, target)

    monkeypatch.setattr("megatron.core.datasets.indexed_dataset.os.replace", dies_after_bin)
    with pytest.raises(OSError, match="power lost"):
        write(tmp_path / "a", [[1], [2], [3, 4, 5, 6, 7, 8]])
    with pytest.raises(FileNotFoundError):
        IndexedDataset(tmp_path / "a")


def test_two_writers_of_one_prefix_exclude_each_other(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1, 2, 3])
        with pytest.raises(ValueError, match="another process is writing"):
            IndexedDatasetWriter(tmp_path / "a", "uint16")
        writer.finalize()
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [1, 2, 3]


def test_fingerprint_follows_the_index(tmp_path: Path) -> None:
    first, same, other = (write(tmp_path / name, docs) for name, docs in zip("abc", (DOCUMENTS, DOCUMENTS, [[1] * 8])))
    assert IndexedDataset(first).fingerprint == IndexedDataset(same).fingerprint
    assert IndexedDataset(first).fingerprint != IndexedDataset(other).fingerprint


def test_a_copy_opens_the_files_again(tmp_path: Path) -> None:
    """As it happens in loader processes that are not forked."""
    indexed = copy.copy(IndexedDataset(write(tmp_path / "a", DOCUMENTS)))
    assert indexed[3].tolist() == DOCUMENTS[3]


def test_token_type_follows_the_vocabulary() -> None:
    assert optimal_dtype(65499) == np.uint16 and optimal_dtype(65500) == np.int32


def test_many_sequences_cross_the_block_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.datasets.indexed_dataset.BLOCK", 3)
    documents = [list(range(i % 4)) for i in range(11)]
    write(tmp_path / "a", documents)
    assert (tmp_path / "a.idx").read_bytes() == index_by_hand(8, [i % 4 for i in range(11)], list(range(12)))
    indexed = IndexedDataset(tmp_path / "a")
    assert [indexed[i].tolist() for i in range(11)] == documents
    raw = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(raw[:-72] + struct.pack("<q", 2) + raw[-64:])  # falls from 2 to 2, at a block edge
    IndexedDataset(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(raw[:-72] + struct.pack("<q", 1) + raw[-64:])
    with pytest.raises(ValueError, match="do not rise"):
        IndexedDataset(tmp_path / "a")


def test_a_disk_that_is_found_full_when_syncing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = IndexedDatasetWriter(tmp_path / "data", np.uint16)
    writer.add_document([1, 2])
    monkeypatch.setattr(os, "fsync", full)
    for name, write in {
        "data.bin.tmp": writer.checkpoint,
        "data.bin": writer.finalize,
        "": lambda: sync_folder(tmp_path),
    }.items():
        with pytest.raises(OSError) as raised:
            write()
        assert str(raised.value.filename).startswith(str(tmp_path / name)), name
    with pytest.raises(OSError) as raised, atomic_writer(tmp_path / "whole") as file:
        file.write(b"x")
    assert raised.value.filename == str(tmp_path / "whole")
    writer.abort()
