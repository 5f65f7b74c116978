"""Reading a step in any division among ranks, in one process or many; needs no torch.distributed."""

import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing import metadata as md
from megatron.core.dist_checkpointing.blocks import Block, TensorShard, view_of

CHUNK_BYTES = 1 << 25
# What is compared at a time: little enough to stay in a processor's cache.
_COMPARED_BYTES = 1 << 20
# Files kept open; any beyond that are opened for each use.
_MOST_OPEN = 256


class CheckpointReader:
    """An opened step. Lists whole tensors, and reads any part of any of them without reading the rest.

    Threads may read at the same time.

    To read a trained model's weights in one process:

        with CheckpointReader(folder) as reader:          # ValueError if sharded.json is damaged
            reader.verify(("weight",))                    # ValueError naming the file with a wrong checksum
            for name, tensor in reader.tensors("weight").items():      # global Megatron names; no padding
                tensor.shape, tensor.dtype, reader.arguments["num_layers"]
                whole = reader.read(name)
                part = reader.read(name, rank=1, size=4)  # as tensor-parallel rank 1 of 4 holds it
                some = reader.read_rows(name, range(0, 10))
    """

    def __init__(self, folder: Path) -> None:
        """Reads the metadata. Raises FileNotFoundError or ValueError naming the file if it is missing or damaged."""
        self.folder = Path(folder)
        self.metadata = md.read(self.folder)
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def iteration(self) -> int:
        """Finished steps when it was saved."""
        return self.metadata.iteration

    @property
    def arguments(self) -> dict[str, Any]:
        """Every setting of the run that saved it, under Megatron's names, as plain values."""
        return self.metadata.arguments

    @property
    def state(self) -> dict[str, Any]:
        """What else was saved that is not a tensor, as plain values."""
        return self.metadata.state

    def tensors(self, kind: str = "weight") -> dict[str, md.StoredTensor]:
        """Whole tensors of a kind (weight, master, exp_avg, exp_avg_sq, rng) by global name."""
        return {name: tensor for (own, name), tensor in self.metadata.tensors.items() if own == kind}

    def verify(self, kinds: tuple[str, ...] | None = None, rank: int = 0, size: int = 1) -> None:
        """Compares the checksums of all tensors of `kinds` (None: of all), and of the files' headers and sizes.

        `size` processes can share the work, each reading its share. Raises ValueError or FileNotFoundError naming
        the file and the tensor.
        """
        for name, file in list(self.metadata.files.items())[rank::size]:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: restore it, or use another step")
            found = path.stat().st_size
            if found != file.size:
                raise ValueError(f"{path} has {found} bytes, not {file.size}: restore it, or use another step")
            self._compare(name, Block(0, 1, 0, file.header_size), 1, file.header_checksum, "its header")
        tensors = [t for t in self.metadata.tensors.values() if kinds is None or t.kind in kinds]
        blocks = sorted(
            ((stored.file, stored.block.offset, stored, tensor) for tensor in tensors for stored in tensor.blocks),
            key=lambda entry: entry[:2],
        )
        total = sum(entry[2].block.numel * entry[3].dtype.itemsize for entry in blocks)
        before = 0
        for name, _, stored, tensor in blocks:
            if before * size // max(total, 1) == rank:
                self._compare(
                    name, stored.block, tensor.dtype.itemsize, stored.checksum, f"{tensor.kind} of {tensor.name}"
                )
            before += stored.block.numel * tensor.dtype.itemsize

    def _compare(self, name: str, block: Block, itemsize: int, expected: int, what: str) -> None:
        checksum, size = 0, block.numel * itemsize
        buffer = memoryview(bytearray(min(size, _COMPARED_BYTES)))
        for begin in range(0, size, _COMPARED_BYTES):
            chunk = buffer[: size - begin]
            self._read_bytes(name, chunk, block.offset + begin)
            checksum = zlib.crc32(chunk, checksum)
        if checksum != expected:
            raise ValueError(
                f"{self.folder / name} was altered: the checksum of {what} does not match; restore it, or use "
                "another step"
            )

    def read(
        self,
        name: str,
        kind: str = "weight",
        rank: int = 0,
        size: int = 1,
        padded_length: int | None = None,
    ) -> Tensor:
        """Part `rank` of `size` of a tensor, as tensor-parallel ranks hold it, on the CPU.

        `padded_length` is the length of the cut dimension with vocabulary padding, whose rows are zeros. A tensor
        that is not cut comes whole. Raises KeyError if the checkpoint has no such tensor.
        """
        tensor = self.metadata.tensors[kind, name]
        shape = list(tensor.shape)
        if tensor.partition_dim is not None:
            length = padded_length or shape[tensor.partition_dim]
            if length % (size * tensor.stride):
                raise ValueError(
                    f"{name}: dimension {tensor.partition_dim} of {length} cannot be cut into {size} parts"
                )
            shape[tensor.partition_dim] = length // size
        self._check_files(tensor)
        whole = torch.empty(shape, dtype=tensor.dtype)
        self.read_into(
            TensorShard(
                kind=kind,
                name=name,
                shape=tensor.shape,
                data=whole.view(-1),
                partition_dim=tensor.partition_dim,
                stride=tensor.stride,
                rank=rank,
                size=size,
                padded_length=padded_length,
            )
        )
        return whole

    def read_rows(self, name: str, rows: range, kind: str = "weight") -> Tensor:
        """Consecutive rows (along the first dimension) of a whole tensor, on the CPU."""
        tensor = self.metadata.tensors[kind, name]
        assert rows.step == 1 and 0 <= rows.start <= rows.stop <= tensor.shape[0], (name, rows)
        self._check_files(tensor)
        target = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype)
        self.read_into(
            TensorShard(
                kind=kind,
                name=name,
                shape=tensor.shape,
                data=target.view(-1),
                start=rows.start * target[0].numel() if len(rows) else 0,
                partition_dim=tensor.partition_dim,
                stride=tensor.stride,
            )
        )
        return target

    def mismatch(self, shard: TensorShard, same_type: bool = True) -> str | None:
        """Why the checkpoint cannot fill `shard` (with `same_type`: bit for bit), None if it can."""
        tensor = self.metadata.tensors.get((shard.kind, shard.name))
        if tensor is None:
            return f"{shard.kind} of {shard.name} is missing"
        if tensor.shape != shard.shape:
            return f"{shard.kind} of {shard.name} has shape {tensor.shape}, not {shard.shape}"
        if (tensor.partition_dim, tensor.stride) != (shard.partition_dim, shard.stride):
            return f"{shard.kind} of {shard.name} is cut in another way"
        if same_type and tensor.dtype != shard.data.dtype:
            ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (shard.data.dtype, tensor.dtype))
            return f"{shard.kind} of {shard.name} is {theirs}, not {ours}"
        return None

    @torch.no_grad()
    def read_into(self, shard: TensorShard) -> None:
        """Fills `shard.data`, on any device, with what the checkpoint has for it; padding becomes zero.

        Values are converted if the types differ. Raises OSError or ValueError if a file cannot be read.
        """
        tensor = self.metadata.tensors[shard.kind, shard.name]
        assert isinstance(shard.data, Tensor), (shard.kind, shard.name)
        if shard.padded_length is not None:
            shard.data.zero_()
        for block in shard.blocks():
            for stored in tensor.blocks:
                common = block.intersect(stored.block)
                if common is not None:
                    self._copy(stored, tensor.dtype, common, view_of(shard.data, block, common))

    def _copy(self, stored: md.StoredBlock, dtype: torch.dtype, part: Block, target: Tensor) -> None:
        """Reads `part` of a stored block into `target` [rows, columns], a bounded piece at a time."""
        in_one_run = part.rows == 1 or part.columns == stored.block.columns
        for piece in _pieces(part, CHUNK_BYTES // dtype.itemsize):
            rows = slice(piece.row_begin - part.row_begin, piece.row_end - part.row_begin)
            columns = slice(piece.column_begin - part.column_begin, piece.column_end - part.column_begin)
            view = target[rows, columns]
            direct = view.dtype == dtype and view.device.type == "cpu" and view.is_contiguous()
            buffer = view if direct else torch.empty(piece.rows, piece.columns, dtype=dtype)
            runs = [(buffer, piece.row_begin)] if in_one_run else zip(buffer, range(piece.row_begin, piece.row_end))
            for run, row in runs:
                start = stored.block._replace(offset=0).position(row, piece.column_begin)
                content = memoryview(run.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                self._read_bytes(stored.file, content, stored.block.offset + start * dtype.itemsize)
            if not direct:
                view.copy_(buffer)

    def _check_files(self, tensor: md.StoredTensor) -> None:
        """Raises ValueError if a file lacks what it should have of a tensor, before memory is taken for that."""
        for name in {stored.file for stored in tensor.blocks}:
            with self._open(name) as descriptor:
                found, expected = os.fstat(descriptor).st_size, self.metadata.files[name].size
            if found < expected:
                raise ValueError(f"{self.folder / name} is cut short: restore it, or use another step")

    def _read_bytes(self, name: str, buffer: memoryview, offset: int) -> None:
        with self._open(name) as descriptor:
            while buffer:
                count = os.preadv(descriptor, [buffer], offset)
                if count == 0:
                    raise ValueError(f"{self.folder / name} is cut short: restore it, or use another step")
                buffer, offset = buffer[count:], offset + count

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        with self._lock:
            descriptor = self._descriptors.get(name)
            if descriptor is None:
                descriptor = os.open(self.folder / name, os.O_RDONLY)
            kept = name in self._descriptors or len(self._descriptors) < _MOST_OPEN
            if kept:
                self._descriptors[name] = descriptor
        try:
            yield descriptor
        finally:
            if not kept:
                os.close(descriptor)


def _pieces(part: Block, limit: int) -> Iterator[Block]:
    """`part` in pieces of at most `limit` elements: whole rows together, or a row too long for that in sections."""
    if part.columns > limit:
        for row in range(part.row_begin, part.row_end):
            for column in range(part.column_begin, part.column_end, limit):
                yield Block(row, row + 1, column, min(column + limit, part.column_end))
        return
    step = limit // part.columns
    for row in range(part.row_begin, part.row_end, step):
        yield part._replace(row_begin=row, row_end=min(row + step, part.row_end))
