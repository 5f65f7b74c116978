"""Folders as Megatron-LM writes them with `--ckpt-format torch_dist`, written by PyTorch's distributed checkpoint."""

import argparse
import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

Pieces = list[tuple[tuple[int, ...], torch.Tensor]]
"""The chunks of a tensor: where each begins, and its elements."""


class _Planner(dcp.DefaultSavePlanner):
    """Saves every tensor in the chunks that it is given in, as the ranks of a job do together."""

    def __init__(self, tensors: dict[str, Pieces], objects: dict[str, Any]) -> None:
        super().__init__()
        self._tensors, self._objects = tensors, objects
        self._data: dict[MetadataIndex, Any] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, pieces in self._tensors.items():
            axes = zip(*((begin + size for begin, size in zip(at, piece.shape)) for at, piece in pieces), strict=True)
            shape = torch.Size([max(ends) for ends in axes])
            for number, (at, piece) in enumerate(pieces):
                chunk = ChunkStorageMetadata(torch.Size(at), piece.shape)
                index = MetadataIndex(key, torch.Size(at), number)
                data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), shape)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._data[index] = piece
        for key, value in self._objects.items():
            index = MetadataIndex(key)
            items.append(WriteItem(index, WriteItemType.BYTE_IO))
            buffer = io.BytesIO()
            torch.save(value, buffer)
            self._data[index] = buffer
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        found = self._data[write_item.index]
        return found.detach().clone() if isinstance(found, torch.Tensor) else io.BytesIO(found.getvalue())


def save_torch_dist(
    folder: Path,
    tensors: dict[str, Pieces],
    args: argparse.Namespace,
    *,
    objects: dict[str, Any] | None = None,
    common_state: bool = False,
    files: int = 2,
) -> None:
    """Writes a step's folder; `common_state` puts the arguments where Megatron-Core 0.19 and later have them."""
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
    objects = dict(objects or {})
    if common_state:
        objects["common_state/shard_0_1"] = [common]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"unused": 0},
            storage_writer=dcp.FileSystemWriter(folder, thread_count=files),
            planner=_Planner(tensors, objects),
            no_dist=True,
        )
    if not common_state:
        torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
