"""Damaged and hostile torch_dist folders: one sentence that names the file and the key; nothing in them runs."""

import argparse
import io
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch_dist_testing import save_torch_dist

from megatron.core.interchange import stored_tensor
from megatron.core.interchange.torch_dist import METADATA_FILE, CheckpointFolder, saved_arguments

KEY = "decoder.layers.mlp.router.weight"
FIRST = MetadataIndex(KEY, torch.Size([0, 0]))
Change = Callable[[Metadata], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tensor in two chunks, and an object."""
    torch.manual_seed(0)
    pieces = [((0, 0), torch.randn(2, 8)), ((2, 0), torch.randn(3, 8))]
    save_torch_dist(
        tmp_path / "step", {KEY: pieces}, argparse.Namespace(num_layers=4), objects={"rng_state/shard_0_1": [1]}
    )
    return tmp_path / "step"


def change(folder: Path, alter: Change) -> None:
    path = folder / METADATA_FILE
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(alter(metadata) or metadata))


def refusal(folder: Path) -> str:
    """The sentence that reading every element ends with."""
    with pytest.raises(ValueError) as caught:
        checkpoint = CheckpointFolder(folder)
        for key in checkpoint.catalog.tensors:
            shape = checkpoint.shape(key)
            target = np.empty(shape, np.float32)
            checkpoint.read_into(target, key, (), range(shape[0]), "float32")
    return str(caught.value)


def chunks(metadata: Metadata) -> list[ChunkStorageMetadata]:
    return metadata.state_dict_metadata[KEY].chunks  # type: ignore[union-attr]


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def _set(target: Any, **values: Any) -> None:
    vars(target).update(values)


def _place(metadata: Metadata, **values: Any) -> None:
    _set(metadata.storage_data[FIRST], **values)


def _huge(metadata: Metadata) -> None:
    _set(metadata.state_dict_metadata[KEY], size=torch.Size([10**18, 8]))
    _set(chunks(metadata)[1], sizes=torch.Size([10**18 - 2, 8]))


DAMAGES: dict[str, tuple[Change, str]] = {
    "payload": (lambda m: _set(m, planner_data=Payload()), "posix.system, which is never run"),
    "class": (lambda m: _set(m, planner_data=argparse.ArgumentParser), "argparse.ArgumentParser, which is never run"),
    "no metadata": (lambda m: {"a": 1}, "something else where a Metadata belongs"),
    "gap": (lambda m: chunks(m).pop() and None, f"the chunks of {KEY} leave gaps"),
    "no chunk": (lambda m: chunks(m).clear(), f"the chunks of {KEY} leave gaps"),
    "overlap": (lambda m: _set(chunks(m)[1], offsets=torch.Size([0, 0])), f"the chunks of {KEY} overlap"),
    "outside": (lambda m: _set(chunks(m)[1], sizes=torch.Size([4, 8])), f"a chunk of {KEY} lies outside of its shape"),
    "axes": (lambda m: _set(chunks(m)[1], sizes=torch.Size([3])), f"a chunk of {KEY} lies outside of its shape"),
    "huge": (_huge, f"a chunk of {KEY} has more elements than bytes"),
    "past the end": (lambda m: _place(m, offset=10**9), f"{KEY} lies beyond the end of"),
    "negative": (lambda m: _place(m, offset=-5), f"{KEY} lies beyond the end of"),
    "no file": (lambda m: _place(m, relative_path="__9_9.distcp"), "is in __9_9.distcp, which is not there"),
    "another folder": (lambda m: _place(m, relative_path="../a.distcp"), "is said to be in a file '../a.distcp'"),
    "no place": (lambda m: m.storage_data.pop(FIRST) and None, f"nothing says where {KEY} is from [0, 0] on"),
    "compressed": (lambda m: _place(m, transform_descriptors=["zstd"]), f"{KEY} is compressed or encrypted"),
    "other type": (
        lambda m: _set(m.state_dict_metadata[KEY].properties, dtype=torch.int32),  # type: ignore[union-attr]
        "is not of the shape and type that .metadata says",
    ),
    "other place": (
        lambda m: _place(m, offset=next(i for k, i in m.storage_data.items() if k.fqn != KEY).offset,
                         relative_path=next(i for k, i in m.storage_data.items() if k.fqn != KEY).relative_path),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_metadata_claims_is_checked(folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    alter, sentence = DAMAGES[damage]
    change(folder, alter)
    found = refusal(folder)
    assert sentence in found and str(folder) in found
    assert not (folder / "harmed").exists()


def test_a_cut_off_metadata_file_is_refused_at_every_length(folder: Path) -> None:
    whole = (folder / METADATA_FILE).read_bytes()
    for length in range(0, len(whole), 37):
        (folder / METADATA_FILE).write_bytes(whole[:length])
        assert "it is damaged or cut short" in refusal(folder)


def test_a_changed_byte_of_a_tensor_is_noticed(folder: Path) -> None:
    value = CheckpointFolder(folder).catalog.tensors[KEY].chunks[1].place
    path = folder / value.file
    content = bytearray(path.read_bytes())
    archive = bytes(content[value.offset : value.offset + value.length])
    numbers = torch.load(io.BytesIO(archive)).numpy().tobytes()
    content[content.index(numbers) + 5] ^= 4
    path.write_bytes(content)
    assert f"cannot read {path}: the checksum of" in refusal(folder)


def test_threads_that_read_the_same_chunk_compare_its_checksum_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk may hold a weight of all layers and experts, each of which is read by some thread."""
    checkpoint, fill = CheckpointFolder(folder), stored_tensor._fill
    others: list[threading.Thread] = []
    reads = []

    def read() -> None:
        checkpoint.read_into(np.empty(8, np.float32), KEY, (3,), range(8), "float32")

    def noted(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
        reads.append(len(view))
        if len(reads) == 1:
            others.extend(threading.Thread(target=read) for _ in range(3))
            for other in others:
                other.start()
        fill(descriptor, view, offset, path)

    monkeypatch.setattr(stored_tensor, "_fill", noted)
    read()
    for other in others:
        other.join()
    assert sorted(reads) == [32] * 4 + [96]


def test_a_cut_off_file_is_noticed_before_anything_is_read(folder: Path) -> None:
    file = CheckpointFolder(folder).catalog.tensors[KEY].chunks[1].place.file
    os.truncate(folder / file, (folder / file).stat().st_size - 1)
    assert f"lies beyond the end of {file}" in refusal(folder)


def test_arguments_that_are_missing_or_hostile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.save({"args": argparse.Namespace(num_layers=4, hook=Payload())}, folder / "common.pt")
    args = saved_arguments(CheckpointFolder(folder))
    assert args.num_layers == 4 and not (folder / "harmed").exists()
    whole = (folder / "common.pt").read_bytes()
    for length in (0, 700, len(whole) - 1):
        (folder / "common.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot read .*common\.pt: it is damaged or cut short"):
            saved_arguments(CheckpointFolder(folder))
    torch.save({"iteration": 4}, folder / "common.pt")
    with pytest.raises(ValueError, match="has no training arguments"):
        saved_arguments(CheckpointFolder(folder))
    (folder / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"has neither common\.pt nor common_state"):
        saved_arguments(CheckpointFolder(folder))
