"""Types of tensors' elements by name, and the numpy arrays that hold them: bfloat16, which numpy lacks, as its bits.

Converting weights needs nothing else of torch, whose import takes longer than the conversion of two gigabytes.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
STORED_AS: dict[str, "np.dtype[Any]"] = {
    "float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2"), "float64": np.dtype("<f8"),
}  # fmt: skip
"""The type of the array that holds elements of each type."""


def cast(array: Array, source: str, target: str) -> Array:
    """The elements of `array`, which are of type `source`, as `target`; rounded to the nearest, ties to even."""
    if source == target:
        return array
    if source == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    if target != "bfloat16":
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            return array.astype(STORED_AS[target])
    with np.errstate(over="ignore"):
        wide = np.ascontiguousarray(array, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)


def to_torch(array: Array, dtype: str) -> "torch.Tensor":
    """A torch tensor of `array`, whose elements are of type `dtype`; in the same memory where possible."""
    import torch

    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor: "torch.Tensor") -> Array:
    """The array that holds a torch tensor's elements; in the same memory where possible."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def dtype_name(dtype: "torch.dtype") -> str:
    """Name of a torch type, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
