"""How one weight is cut into tensor-parallel parts: shared by the parallel layers and the checkpoint tools.

`partition_dim` is the dimension that is cut (None: every rank holds the whole tensor). `stride` is how many blocks
lie one after the other along that dimension, each cut by itself: with stride 2 a fused [gate; up] matrix gives every
rank its gate rows followed by its up rows. These are the two attributes Megatron keeps on its parameters.
"""

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
