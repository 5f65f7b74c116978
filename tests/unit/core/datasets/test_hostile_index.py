"""What an `.idx` claims is checked against the two files' sizes: planted claims, and damage."""

import gc
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.indexed_dataset import HEADER, MAGIC, IndexedDataset

LENGTHS = [3, 0, 5, 2]


def write(folder: Path, index: bytes) -> str:
    """A data set of 10 tokens with this index."""
    (folder / "a.idx").write_bytes(index)
    (folder / "a.bin").write_bytes(np.arange(sum(LENGTHS), dtype="<u2").tobytes())
    return str(folder / "a")


def index(
    lengths: list[int] = LENGTHS,
    offsets: list[int] | None = None,
    documents: tuple[int, ...] = (0, 2, 4),
    header: bytes | None = None,
) -> bytes:
    """An index; a right one, apart from what is given."""
    if offsets is None:
        offsets = [2 * sum(lengths[:number]) for number in range(len(lengths))]
    header = header or HEADER.pack(MAGIC, 1, 8, len(lengths), len(documents))
    arrays = np.array(lengths, "<i4"), np.array(offsets, "<i8"), np.array(documents, "<i8")
    return header + b"".join(array.tobytes() for array in arrays)


def read_all(prefix: str) -> None:
    """Everything that training and the tools read of a data set."""
    dataset = IndexedDataset(prefix)
    for document in range(dataset.document_count):
        assert len(dataset.get_document(document)) == dataset.document_lengths(document, document + 1)[0]
    assert sum(len(dataset[sequence]) for sequence in range(len(dataset))) == dataset.token_count
    assert len(dataset.fingerprint) == 64
    dataset.count_tokens(0, dataset.document_count)


LEAST, MOST = -(1 << 63), (1 << 63) - 1
CLAIMS = {
    "2^63 sequences": index(header=HEADER.pack(MAGIC, 1, 8, 1 << 63, 3)),
    "a number of sequences that wraps around": index(header=HEADER.pack(MAGIC, 1, 8, (1 << 64) - 1, 3)),
    "no documents": index(documents=()), "2^60 documents": index(header=HEADER.pack(MAGIC, 1, 8, 4, 1 << 60)),
    "negative lengths": index(lengths=[3, -2, 7, 2]), "lengths of 2^31 - 1": index(lengths=[(1 << 31) - 1] * 4),
    "offsets that wrap around": index(offsets=[0, MOST, LEAST, 16]),
    "documents whose differences wrap around": index(documents=(0, MOST, LEAST, -1, 4)),
    "documents that fall": index(documents=(0, 3, 2, 4)), "a document behind the end": index(documents=(0, 7, 4)),
    "token type 0": index(header=HEADER.pack(MAGIC, 1, 0, 4, 3)), "nothing": b"", "a header cut short": index()[:20],
}  # fmt: skip


@pytest.mark.parametrize("content", CLAIMS.values(), ids=CLAIMS.keys())
def test_claims_are_refused(tmp_path: Path, content: bytes) -> None:
    read_all(write(tmp_path, index()))
    with pytest.raises(ValueError, match=r"a\.(idx|bin)"):
        read_all(write(tmp_path, content))


def test_damage_is_a_sentence(tmp_path: Path) -> None:
    generator, refused, good = random.Random(5), 0, index()
    for _ in range(1500):
        spoiled = bytearray(good)
        for _ in range(generator.choice((1, 2))):
            place = generator.randrange(len(good) - 8)
            value = generator.choice((0, 1, 2, 4, MOST, LEAST, -1, generator.getrandbits(40)))
            size = generator.choice((1, 4, 8))
            spoiled[place : place + size] = struct.pack("<q", value)[:size]
        try:
            read_all(write(tmp_path, bytes(spoiled)))
        except ValueError as error:
            refused += 1
            assert str(tmp_path / "a") in str(error)
    assert refused > 1000


def test_mapped_data_sets_keep_no_descriptor(tmp_path: Path) -> None:
    prefix = write(tmp_path, index())
    before = len(os.listdir("/dev/fd"))
    kept = [IndexedDataset(prefix, random_access=bool(number % 2)) for number in range(50)]
    assert len(os.listdir("/dev/fd")) == before
    assert all(dataset[2].tolist() == [3, 4, 5, 6, 7] for dataset in kept)
    tokens = kept[0][2]
    del kept
    gc.collect()
    assert tokens.tolist() == [3, 4, 5, 6, 7], "memory lives as long as what looks into it"
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
