"""What a `.pt` file claims is checked before anything is allocated: planted claims, and damage of every kind."""

import random
import tracemalloc
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.core.interchange import load_torch
from megatron.core.interchange.stored_tensor import open_torch, stored_tensor
from megatron.core.interchange.torch_pickle import TensorEntry, write_pickle

_MOST_BYTES = 200 << 20


def archive(path: Path, described: bytes, records: dict[str, bytes] | None = None, method: int = 0) -> Path:
    """A `.pt` file of this pickle, its checksums right."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in {"data.pkl": described, "byteorder": b"little", **(records or {})}.items():
            file.writestr(f"a/{name}", content)
    return path


def read_all(path: Path) -> None:
    """Everything that a converter reads of a file."""
    content, records = open_torch(path)
    for name, value in content.items():
        if isinstance(value, TensorEntry) or hasattr(value, "untyped_storage"):
            stored_tensor(path, records, name, value).read()
    repr(content)


def name(full: str) -> bytes:
    """A global name."""
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value: bytes) -> bytes:
    """A text."""
    return b"X" + len(value).to_bytes(4, "little") + value


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], start: int = 0, storage: int | None = None) -> bytes:
    """A file's pickle with one float32 tensor `w` and its storage's own claim of elements."""
    whole = write_pickle({"w": TensorEntry("data/0", "float32", shape, stride, start)})
    if storage is None:
        return whole
    claimed = start + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    old, new = (write_pickle(number)[2:-1] for number in (claimed, storage))
    assert whole.count(text(b"cpu") + old) == 1
    return whole.replace(text(b"cpu") + old, text(b"cpu") + new)


FIVE_GIGABYTES = write_pickle(5 << 30)[2:-1]
CLAIMS = {
    "bytearray(5 GB)": b"\x80\x02" + name("builtins.bytearray") + FIVE_GIGABYTES + b"\x85R.",
    "bytes that are not there": b"\x80\x04\x8e" + (5 << 30).to_bytes(8, "little") + b"abc.",
    "an array of bytes that are not there": b"\x80\x05\x96" + (5 << 30).to_bytes(8, "little") + b"abc.",
    "a memo of 2^32 places": b"\x80\x02}r\xff\xff\xff\xff" + b"j\xf0\xff\xff\xff.",
    "copies of one text": b"\x80\x02" + text(bytes(1 << 20)) + b"q\x010]"
    + (name("_codecs.encode") + b"h\x01" + text(b"latin1") + b"\x86Ra") * 5000 + b".",
    "a key that takes 2^60 steps to hash": b"\x80\x02}N" + b"\x85q\x010h\x01h\x01\x86" * 60 + b"Ns.",
    "a value that takes 2^60 steps to print": b"\x80\x02}" + text(b"a") + b"N" + b"q\x01h\x01\x86" * 60 + b"s.",
    "keys of one hash": b"\x80\x02}(" + b"".join(
        b"\x8a\x09" + (i * ((1 << 61) - 1)).to_bytes(9, "little") + b"N" for i in range(1, 60)) + b"u.",
    "nesting": b"\x80\x02}" + text(b"a") + b"N" + b"\x85" * 5000 + b"s.",
    "a list within itself": b"\x80\x02}" + text(b"a") + b"]q\x01h\x01as.",
    "operations without end": b"\x80\x02" + b"N" * 3_000_000 + b".",
    "shape 2^40": tensor((1 << 40,), (1,)),
    "shape 2^40 without a step": tensor((1 << 40,), (0,)),
    "step 2^40": tensor((2, 2), (1 << 40, 1)),
    "a start beyond": tensor((1,), (1,), start=1 << 20),
    "the next record's bytes": tensor((5,), (1,)),
    "the next record's bytes, of a short storage": tensor((5,), (1,), storage=4),
    "elements that are negative": tensor((4,), (1,), storage=-4),
    "no elements, 2^62 of them": tensor((0, 1 << 62, 1 << 62), (1, 1, 1)),
    "a storage without a record": write_pickle({"w": TensorEntry("data/7", "float32", (1,), (1,))}),
    "a mark": b"\x80\x02(.", "nothing": b"",
    "a shape that is a text": tensor((4,), (1,)).replace(b"(J\x04\0\0\0t", b"N"),
}  # fmt: skip


@pytest.mark.parametrize("described", CLAIMS.values(), ids=CLAIMS.keys())
def test_claims_are_refused_before_anything_is_allocated(tmp_path: Path, described: bytes) -> None:
    path = archive(tmp_path / "a.pt", described, {"data/0": bytes(16), "data/1": bytes(64)})
    for read in (open_torch, load_torch):
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"cannot read .*a\.pt: .*; restore the file") as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < _MOST_BYTES and len(str(caught.value)) < 500
        tracemalloc.stop()


def test_records_are_stored_and_apart(tmp_path: Path) -> None:
    good = tensor((4,), (1,))
    path = archive(tmp_path / "a.pt", good + bytes(1 << 20), {"data/0": bytes(16)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"'a/data\.pkl' is compressed"):
        load_torch(path)
    archive(path, good, {"data/0": bytes(16), "data/1": bytes(16)})
    read_all(path)
    data = path.read_bytes()
    first, second = (data.rindex(entry) - 4 for entry in (b"a/data/0", b"a/data/1"))
    overlapping = data[:second] + data[first : first + 4] + data[second + 4 :]
    path.write_bytes(overlapping)
    with pytest.raises(ValueError, match="overlap"):
        load_torch(path, verify=False)
    path.write_bytes(b"in front" + data)
    with pytest.raises(ValueError, match="overlap or lie outside"):
        load_torch(path, verify=False)


def _model(path: Path, zipped: bool) -> bytes:
    content = {
        "w": torch.randn(6, 8), "turned": torch.randn(4, 6).T, "half": torch.randn(3).bfloat16(),
        "none": torch.empty(0),
        "args": Namespace(a=[1, 2.5, None], b={"c": (True, b"\xff"), "kind": torch.bfloat16}),
    }  # fmt: skip
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read_all(path)
    return path.read_bytes()


def _damaged(data: bytes, generator: random.Random) -> bytes:
    """`data` with bytes changed, cut out, repeated or put in."""
    result = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 8))):
        place, size = generator.randrange(len(result)), generator.choice((1, 1, 2, 4, 30))
        change = generator.randrange(5)
        if change == 0:
            result[place] = generator.randrange(256)
        elif change == 1:
            result[place : place + size] = generator.choice((b"\xff", b"\0", b"\x7f")) * size
        elif change == 2 and len(result) > 2 * size:
            del result[place : place + size]
        elif change == 3:
            result[place:place] = result[max(0, place - size) : place]
        else:
            result.insert(place, generator.choice(b"N}]().RbQ0q\x85\x86\x8at"))
    return bytes(result)


@pytest.mark.parametrize("kind", ["the file", "its pickle", "a file of before torch 1.6"])
def test_damage_is_a_sentence(tmp_path: Path, kind: str) -> None:
    """Whatever is changed, the file is read or refused with its name; the pickle's checksum is made right again."""
    path, generator, refused = tmp_path / "a.pt", random.Random(7), 0
    data = _model(path, kind != "a file of before torch 1.6")
    records: dict[str, bytes] = {}
    if kind == "its pickle":
        with zipfile.ZipFile(path) as file:
            records = {entry.partition("/")[2]: file.read(entry) for entry in file.namelist()}
        described = records.pop("data.pkl")
        del records["byteorder"]
    tracemalloc.start()
    for _ in range(300):
        if records:
            archive(path, _damaged(described, generator), records)
        else:
            path.write_bytes(_damaged(data, generator))
        for read in (read_all, load_torch):
            try:
                read(path)
            except ValueError as error:
                refused += 1
                assert "a.pt" in str(error) or "not a tensor" in str(error), error
    assert refused > 100 and tracemalloc.get_traced_memory()[1] < _MOST_BYTES
    tracemalloc.stop()
