"""Folders as Megatron-LM writes them with `--ckpt-format torch_dist`, written by PyTorch's distributed checkpoint."""

import argparse
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron.core.models.weight_table import WeightRule

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


FUSED_NORM = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
LOCAL_NORM = {**FUSED_NORM, "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


def pieces_of_model(
    rules: Iterable[WeightRule],
    read: Callable[[WeightRule], torch.Tensor],
    *,
    tp: int = 2,
    norms: Mapping[str, str] = FUSED_NORM,
    prefix: str = "",
    per_layer: bool = False,
    whole: bool = False,
) -> dict[str, Pieces]:
    """What `tp` ranks of Megatron-LM save of the weights that `read` gives, by key."""
    tensors: dict[str, Pieces] = {}
    for rule in rules:
        name, at = rule.name, []
        if rule.layer is not None:
            name = rule.name.replace(f"layers.{rule.layer}.", "")
            at = [] if per_layer else [rule.layer]
        if rule.expert is not None:
            name = re.sub(r"local_experts\.[0-9]+", "experts", name)
            at.append(rule.expert)
        for ours, theirs in norms.items():
            name = name.replace(ours, theirs)
        if rule.layer is not None:
            name = name.replace("decoder.", f"decoder.layers.{rule.layer}." if per_layer else "decoder.layers.")
        for start, piece in _cut(rule, read(rule), tp):
            shaped = piece.reshape((1,) * len(at) + piece.shape)
            tensors.setdefault(prefix + name, []).append(((*at, *start), shaped))
    return {key: [_joined(pieces)] for key, pieces in tensors.items()} if whole else tensors


def _cut(rule: WeightRule, whole: torch.Tensor, tp: int) -> Pieces:
    """The chunks that `tp` ranks write: gate and up are cut by themselves."""
    if rule.partition_dim is None:
        return [((0,) * whole.dim(), whole)]
    pieces = whole.chunk(tp * rule.partition_stride, dim=rule.partition_dim)
    size = whole.shape[rule.partition_dim] // len(pieces)
    starts = [[0] * whole.dim() for _ in pieces]
    for number, start in enumerate(starts):
        start[rule.partition_dim] = number * size
    return [(tuple(start), piece.contiguous()) for start, piece in zip(starts, pieces, strict=True)]


def _joined(pieces: Pieces) -> tuple[tuple[int, ...], torch.Tensor]:
    ends = [[begin + size for begin, size in zip(at, piece.shape)] for at, piece in pieces]
    joined = torch.empty([max(axis) for axis in zip(*ends)], dtype=pieces[0][1].dtype)
    for at, piece in pieces:
        joined[tuple(slice(begin, begin + size) for begin, size in zip(at, piece.shape))] = piece
    return (0,) * joined.dim(), joined


def save_torch_dist(
    folder: Path,
    tensors: dict[str, Pieces],
    args: argparse.Namespace,
    *,
    objects: dict[str, Any] | None = None,
    common_state: bool = False,
    common: Mapping[str, Any] | None = None,
    files: int = 2,
) -> None:
    """Writes a step's folder; `common_state` puts the arguments where Megatron-Core 0.19 and later have them.

    `common` is what else all ranks share.
    """
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 7, **(common or {})}
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
