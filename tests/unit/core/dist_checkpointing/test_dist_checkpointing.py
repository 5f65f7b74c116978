"""A tensor saved under one division among ranks is read under any other, bit for bit; damage is named."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.core.dist_checkpointing import CheckpointReader, TensorShard, snapshot, write_metadata, write_shards
from megatron.core.dist_checkpointing import reader as reader_module
from megatron.core.dist_checkpointing import writer as writer_module
from megatron.core.dist_checkpointing.blocks import Block, missing_elements
from megatron.core.tensor_parallel.partition import slice_for_rank

CASES = {
    # name: shape without padding, partition_dim, stride, vocabulary rows with padding for a number of parts
    "norm": ((24,), None, 1, None),
    "qkv": ((24, 5), 0, 1, None),
    "proj": ((5, 24), 1, 1, None),
    "gate_up": ((48, 3), 0, 2, None),
    "embedding": ((37, 3), 0, 1, lambda parts: -(-37 // (4 * parts)) * 4 * parts),
    "middle": ((3, 24, 2), 1, 2, None),
}
VALUES = {name: torch.randn(case[0], generator=torch.Generator().manual_seed(7)) for name, case in CASES.items()}


def _part(name: str, rank: int, size: int) -> tuple[Tensor, int | None]:
    """What tensor-parallel rank `rank` holds, by the layers' own rule."""
    _, dim, stride, padded = CASES[name]
    whole, length = VALUES[name], padded(size) if padded else None
    if length is not None:
        whole = torch.cat([whole, whole.new_zeros(length - whole.shape[0], *whole.shape[1:])])
    return slice_for_rank(whole, dim, stride, rank, size), length


def _shards(name: str, rank: int, size: int, cuts: list[int], fill: bool) -> list[TensorShard]:
    """The part of a rank as flat pieces that end at `cuts`; filled with its values, or with rubbish."""
    shape, dim, stride, _ = CASES[name]
    part, length = _part(name, rank, size)
    flat = part.reshape(-1).clone()
    if not fill:
        flat.fill_(torch.nan)
    ends = sorted({min(cut, flat.numel()) for cut in cuts} | {flat.numel()})
    return [
        TensorShard(
            kind="weight", name=name, shape=shape, data=flat[begin:end], start=begin, partition_dim=dim,
            stride=stride, rank=rank, size=size, padded_length=length,
        )
        for begin, end in zip([0, *ends], ends)
    ]  # fmt: skip


def _save(folder: Path, size: int, cuts: list[int]) -> None:
    folder.mkdir()
    written = []
    for rank in range(size):
        names = [name for name in CASES if rank == 0 or CASES[name][1] is not None]
        shards = [shard for name in names for shard in _shards(name, rank, size, cuts, fill=True)]
        written.append(write_shards(folder, rank, shards))
    write_metadata(folder, written, iteration=3, arguments={"num_layers": 2}, state={"x": 0.1})


@pytest.mark.parametrize("chunk", [5, 1 << 20], ids=["small_chunks", "large_chunks"])
def test_any_division_into_any_other(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", 4 * chunk)
    monkeypatch.setattr(reader_module, "_MOST_OPEN", 2)
    draw = random.Random(0)
    for case, size in enumerate((1, 2, 4, 6)):
        folder = tmp_path / str(case)
        _save(folder, size, [draw.randrange(150) for _ in range(case)])
        with CheckpointReader(folder) as reader:
            reader.verify()
            assert (reader.iteration, reader.arguments, reader.state) == (3, {"num_layers": 2}, {"x": 0.1})
            for name in CASES:
                rows = range(2, VALUES[name].shape[0] - draw.randrange(2))
                assert torch.equal(reader.read_rows(name, rows), VALUES[name][2 : rows.stop])
                for parts in (1, 2, 3, 12):
                    for rank in range(parts):
                        expected, length = _part(name, rank, parts)
                        assert torch.equal(reader.read(name, "weight", rank, parts, length), expected)
                        for shard in _shards(name, rank, parts, [draw.randrange(150) for _ in range(3)], fill=False):
                            assert reader.mismatch(shard) is None
                            reader.read_into(shard)
                            end = shard.start + shard.data.numel()
                            own = expected.reshape(-1)[shard.start : end]
                            assert torch.equal(shard.data, own), (name, rank)
                            shard.data.zero_()
                            for across, columns, data in shard.parts():
                                data += VALUES[name].reshape(len(VALUES[name]), -1)[
                                    across.start : across.stop, columns.start : columns.stop
                                ]
                            assert torch.equal(shard.data, own), (name, rank)


def test_files_are_safetensors_and_types_survive(tmp_path: Path) -> None:
    values = {
        str(dtype): torch.arange(12).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    }
    shards = [TensorShard(kind="weight", name=name, shape=(12,), data=value) for name, value in values.items()]
    written = write_shards(tmp_path, 0, shards)
    write_metadata(tmp_path, [written, None], iteration=1, arguments={}, state={})
    stored = load_file(tmp_path / "rank_00000.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for name, value in values.items():
            assert torch.equal(stored[f"weight/{name}[0:1,0:12]"], value[None])
            assert reader.read(name).dtype == value.dtype and torch.equal(reader.read(name), value)
        other = replace(shards[0], data=torch.empty(12))
        assert "is float64, not float32" in str(reader.mismatch(other))
        assert "has shape (12,), not (3, 4)" in str(reader.mismatch(replace(shards[0], shape=(3, 4))))
        assert "is missing" in str(reader.mismatch(replace(shards[0], name="new")))


def test_a_snapshot_is_a_copy_of_what_is_owned() -> None:
    data = torch.ones(3)
    shard = TensorShard(kind="weight", name="a", shape=(3,), data=data)
    copies = snapshot([shard, replace(shard, name="b", owned=False)])
    data.zero_()
    assert [copy.name for copy in copies] == ["a"] and copies[0].data.tolist() == [1, 1, 1]


def test_what_is_not_saved_exactly_once_is_refused(tmp_path: Path) -> None:
    shard = TensorShard(kind="weight", name="a", shape=(4, 6), data=torch.zeros(12), partition_dim=1, size=2)
    parts = [write_shards(tmp_path, rank, [replace(shard, rank=rank)]) for rank in range(2)]
    state = {"iteration": 1, "arguments": {}, "state": {}}
    with pytest.raises(ValueError, match="weight of a lacks 12 elements"):
        write_metadata(tmp_path, parts[:1], **state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="twice"):
        write_metadata(tmp_path, [*parts, parts[0]], **state)  # type: ignore[arg-type]
    other = write_shards(tmp_path, 2, [replace(shard, rank=1, data=torch.zeros(12).double())])
    with pytest.raises(ValueError, match="ranks disagree"):
        write_metadata(tmp_path, [parts[0], other], **state)  # type: ignore[arg-type]


def test_coverage_counts() -> None:
    left, right = Block(0, 4, 0, 3), Block(0, 4, 3, 6)
    assert missing_elements([left, right], 4, 6) == 0
    assert missing_elements([left], 4, 6) == 12
    assert missing_elements([left, Block(3, 4, 2, 6)], 4, 6) == 8
    assert missing_elements([left, Block(1, 4, 2, 6)], 4, 6) == -1  # as many twice as are missing
    assert missing_elements([right, right], 4, 6) == missing_elements([left, left, right], 4, 6) == -1
    assert missing_elements([left, Block(0, 5, 3, 6)], 4, 6) == -1
    assert missing_elements([left, right, Block(0, 0, 0, 0)], 4, 6) == -1


def _edit_metadata(folder: Path, change: Callable[[dict], None]) -> None:
    document = json.loads((folder / "sharded.json").read_text())
    change(document)
    (folder / "sharded.json").write_text(json.dumps(document))


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    _save(tmp_path / "a", 2, [7, 50])
    for name in ("rank_00000.safetensors", "rank_00001.safetensors", "sharded.json"):
        file = tmp_path / "a" / name
        content = file.read_bytes()
        for position in range(0, len(content), 13 if name != "sharded.json" else 61):
            spoiled = bytearray(content)
            spoiled[position] ^= 4
            file.write_bytes(spoiled)
            with pytest.raises(ValueError, match=name), CheckpointReader(tmp_path / "a") as reader:
                for rank in range(3):  # the work can be shared
                    reader.verify(rank=rank, size=3)
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["rank_00001.safetensors", "sharded.json"])
@pytest.mark.parametrize("keep", [None, 0, 100, -1])
def test_cut_emptied_and_deleted_files_are_named(tmp_path: Path, name: str, keep: int | None) -> None:
    _save(tmp_path / "a", 2, [])
    file = tmp_path / "a" / name
    content = file.read_bytes()
    file.unlink() if keep is None else file.write_bytes(content[:keep])
    with (
        pytest.raises((ValueError, FileNotFoundError), match=name),
        CheckpointReader(tmp_path / "a") as reader,
    ):
        reader.verify()


def test_metadata_that_lies_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "a", 2, [])

    def sum_up(document: dict) -> None:
        from megatron.core.dist_checkpointing import metadata

        document["checksum"] = metadata._checksum(document["content"])

    def drop_a_block(document: dict) -> None:
        next(t for t in document["content"]["tensors"] if t[1] == "qkv")[-1].pop()
        sum_up(document)

    def other_file(document: dict) -> None:
        document["content"]["files"][0][0] = "../elsewhere.safetensors"
        sum_up(document)

    def outside(document: dict) -> None:
        next(t for t in document["content"]["tensors"] if t[1] == "qkv")[-1][0][-1] = 10**9
        sum_up(document)

    whole = (tmp_path / "a" / "sharded.json").read_text()
    for change, message in (
        (drop_a_block, "weight of qkv lacks"),
        (other_file, "is not the name of a file"),
        (outside, "lies outside"),
        (lambda document: document.update(version=2), "version 2"),
        (lambda document: document["content"]["tensors"].pop(), "altered"),
    ):
        _edit_metadata(tmp_path / "a", change)
        with pytest.raises(ValueError, match=message):
            CheckpointReader(tmp_path / "a")
        (tmp_path / "a" / "sharded.json").write_text(whole)
