"""How one weight is cut into tensor-parallel parts: shared by the parallel layers and the checkpoint tools.

`partition_dim` is the dimension that is cut (None: every rank holds the whole tensor). `stride` is how many blocks
lie one after the other along that dimension, each cut by itself: with stride 2 a fused [gate; up] matrix gives every
rank its gate rows followed by its up rows. These are the two attributes Megatron keeps on its parameters.
"""

from collections.abc import Sequence

import torch


def slice_for_rank(tensor: torch.Tensor, partition_dim: int | None, stride: int, rank: int, size: int) -> torch.Tensor:
    """Part of `tensor` that rank `rank` of `size` holds; a view where possible.

    Raises ValueError if the dimension does not divide by stride x size.
    """
    assert 0 <= rank < size and stride >= 1, (rank, size, stride)
    if partition_dim is None or size == 1:
        return tensor
    length = tensor.shape[partition_dim]
    if length % (stride * size):
        raise ValueError(
            f"dimension {partition_dim} of a tensor of shape {tuple(tensor.shape)} cannot be cut into {size} "
            f"tensor-parallel parts in {stride} block(s): choose a size that divides {length // stride}"
        )
    part = length // (stride * size)
    parts = [tensor.narrow(partition_dim, (block * size + rank) * part, part) for block in range(stride)]
    return parts[0] if stride == 1 else torch.cat(parts, dim=partition_dim)


def split_for_tp(tensor: torch.Tensor, partition_dim: int | None, stride: int, tp_size: int) -> list[torch.Tensor]:
    """The parts of `tensor` for all `tp_size` ranks, in rank order; see `slice_for_rank`."""
    return [slice_for_rank(tensor, partition_dim, stride, rank, tp_size) for rank in range(tp_size)]


def join_from_tp(parts: Sequence[torch.Tensor], partition_dim: int | None, stride: int) -> torch.Tensor:
    """The whole tensor from its parts in rank order: the inverse of `split_for_tp`.

    With `partition_dim` None every rank holds a copy; they must be equal bit for bit, otherwise ValueError.
    """
    if len(parts) == 1:
        return parts[0]
    if partition_dim is None:
        for rank, part in enumerate(parts):
            if part.dtype != parts[0].dtype or not torch.equal(part, parts[0]):
                raise ValueError(f"a tensor that every rank holds whole differs between ranks 0 and {rank}")
        return parts[0]
    blocks = [part.chunk(stride, dim=partition_dim) for part in parts]
    return torch.cat([rank_blocks[i] for i in range(stride) for rank_blocks in blocks], dim=partition_dim)
