"""What `sharded.json` claims is checked before anything is allocated or compared: planted claims, and damage."""

import copy
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing import metadata as md
from megatron.core.dist_checkpointing.blocks import TensorShard
from megatron.core.dist_checkpointing.reader import CheckpointReader
from megatron.core.dist_checkpointing.writer import write_metadata, write_shards


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A whole step of two tensors, one of them cut."""
    cut = TensorShard(kind="weight", name="a", shape=(4, 6), data=torch.zeros(12), partition_dim=1, size=2)
    whole = TensorShard(kind="weight", name="b", shape=(5,), data=torch.ones(5))
    parts = [
        write_shards(tmp_path, 0, [cut, whole]),
        write_shards(tmp_path, 1, [TensorShard(**{**vars(cut), "rank": 1})]),
    ]
    write_metadata(tmp_path, parts, iteration=1, arguments={"lr": 1e-3}, state={"n": [1]})
    return tmp_path


def content_of(folder: Path) -> dict[str, Any]:
    """What the metadata of a step holds."""
    return json.loads((folder / md.SHARDED_FILE).read_text())["content"]


def plant(folder: Path, content: Any) -> None:
    """Metadata with this content and a checksum that is right."""
    text = json.dumps(content, separators=(",", ":"))
    document = f'{{"format":"{md.FORMAT}","version":1,"checksum":{zlib.crc32(text.encode())},"content":{text}}}'
    (folder / md.SHARDED_FILE).write_text(document)


def read_all(folder: Path) -> None:
    """Everything that a user of a step reads."""
    with CheckpointReader(folder) as reader:
        reader.verify()
        for name in reader.tensors():
            reader.read(name)


def _tensor(place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["tensors"][0].__setitem__(place, value)


def _block(place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["tensors"][0][6][0].__setitem__(place, value)


CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "stride 0": _tensor(5, 0), "stride -1": _tensor(5, -1), "stride true": _tensor(5, True),
    "stride null": _tensor(5, None), "partition_dim 7": _tensor(4, 7), "partition_dim -1": _tensor(4, -1),
    "partition_dim a list": _tensor(4, [1]), "shape 2^40 squared": _tensor(3, [1 << 40, 1 << 40]),
    "a shape of 10^5 numbers": _tensor(3, [1 << 50] * 100_000), "a shape of texts": _tensor(3, ["4", "6"]),
    "shape null": _tensor(3, None), "an unknown type": _tensor(2, "F1"), "a type that is a list": _tensor(2, ["F32"]),
    "a kind that is a list": _tensor(0, []), "blocks null": _tensor(6, None), "a block null": _tensor(6, [None]),
    "a file before the first": _block(0, -1), "a file behind the last": _block(0, 9), "half a row": _block(3, 0.5),
    "rows 2^70": _block(3, 1 << 70), "an offset within the header": _block(6, 0),
    "an offset behind the end": _block(6, 1 << 40),
    "bytes of another block": lambda c: c["tensors"][1][6][0].__setitem__(6, c["tensors"][0][6][0][6]),
    "no tensors": lambda c: c.pop("tensors"), "tensors null": lambda c: c.__setitem__("tensors", None),
    "arguments null": lambda c: c.__setitem__("arguments", None), "iteration null": lambda c: c.update(iteration=None),
    "a file above": lambda c: c["files"][0].__setitem__(0, "../rank_00000.safetensors"),
    "a file's size null": lambda c: c["files"][0].__setitem__(1, None),
}  # fmt: skip


@pytest.mark.parametrize("change", CLAIMS.values(), ids=CLAIMS.keys())
def test_claims_are_refused(step: Path, change: Callable[[dict[str, Any]], None]) -> None:
    read_all(step)
    content = content_of(step)
    change(content)
    plant(step, content)
    with pytest.raises(ValueError, match=str(step)) as caught:
        md.read(step)
    assert len(str(caught.value)) < 500


def test_what_only_a_file_could_hold_is_not_allocated(step: Path) -> None:
    content = content_of(step)
    content["files"].append(["rank_00002.safetensors", 1 << 44, 8, 0])
    content["tensors"].append(["weight", "c", "F32", [1 << 40], None, 1, [[2, 0, 0, 1, 0, 1 << 40, 8]]])
    plant(step, content)
    (step / "rank_00002.safetensors").write_bytes(bytes(16))
    with CheckpointReader(step) as reader, pytest.raises(ValueError, match=r"rank_00002\.safetensors is cut short"):
        reader.read("c")
    with CheckpointReader(step) as reader, pytest.raises(ValueError, match=r"rank_00002\.safetensors is cut short"):
        reader.read_rows("c", range(1 << 40))


@pytest.mark.parametrize("nested", ["[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "1" * 5000])
def test_nesting_is_a_sentence(step: Path, nested: str) -> None:
    for text in (nested, (step / md.SHARDED_FILE).read_text().replace("[1]", nested)):
        (step / md.SHARDED_FILE).write_text(text)
        with pytest.raises(ValueError, match=r"sharded\.json is damaged"):
            md.read(step)


def test_many_blocks_in_a_row_are_not_compared_with_each_other(step: Path) -> None:
    """50,000 of them: comparing each with each would take minutes."""
    count = 50_000
    content = content_of(step)
    content["files"].append(["rank_00002.safetensors", 8 + 4 * count, 8, 0])
    blocks = [[2, 0, 0, 1, column, column + 1, 8 + 4 * column] for column in range(count)]
    content["tensors"].append(["weight", "c", "F32", [count], None, 1, blocks])
    plant(step, content)
    assert len(md.read(step).tensors["weight", "c"].blocks) == count
    blocks[7][4:6] = blocks[8][4:6]
    plant(step, content)
    with pytest.raises(ValueError, match="c has elements twice"):
        md.read(step)


def _changed(value: Any, generator: random.Random) -> Any:
    """`value` with one place of it, anywhere within, replaced."""
    if isinstance(value, list | dict) and value and generator.random() < 0.9:
        place = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[place] = _changed(value[place], generator)
        return value
    return copy.deepcopy(generator.choice((None, -1, 0, 1, 2, 7, 1 << 40, 1 << 80, 0.5, True, "", "a", [], [1], {})))


def test_damage_is_a_sentence(step: Path) -> None:
    generator, refused = random.Random(3), 0
    content, text = content_of(step), (step / md.SHARDED_FILE).read_bytes()
    tracemalloc.start()
    for number in range(1500):
        if number % 3:
            plant(step, _changed(copy.deepcopy(content), generator))
        else:
            spoiled = bytearray(text)
            spoiled[generator.randrange(len(text))] = generator.randrange(256)
            (step / md.SHARDED_FILE).write_bytes(spoiled)
        try:
            read_all(step)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert str(step) in str(error) and len(str(error)) < 600
    assert refused > 1000 and tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
