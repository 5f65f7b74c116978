"""Of torch, cuBLAS and FlashAttention, for CUDA devices."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_grouped_mm = getattr(F, "grouped_mm", None)
HAS_GROUPED_MM = _grouped_mm is not None
ADDS_TO_FLOAT32 = "dtype_out" in torch.ops.aten.addmm.overloads()


@functools.cache
def _is_hopper_or_blackwell(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def takes_grouped_mm(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch has grouped_mm and it takes rows of these widths: they must be aligned to 16 bytes."""
    return HAS_GROUPED_MM and dtype != torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in widths)


def wants_grouped_mm(x: Tensor, backend: str) -> bool:
    """Whether grouped_mm is asked for, or by itself (`auto`) for rows like `x` is one kernel.

    For other types and GPUs torch loops over the experts, and waits for the device in each product to know their rows.
    """
    if backend == "auto":
        return x.dtype == torch.bfloat16 and x.is_cuda and _is_hopper_or_blackwell(x.device)
    return backend == "grouped_mm"


def takes_descriptors(*tensors: Tensor) -> bool:
    """Whether TMA moves large tiles of these contiguous tensors: their rows must begin at multiples of 16 bytes."""
    starts = (part * tensor.itemsize for tensor in tensors for part in (tensor.shape[-1], tensor.storage_offset()))
    has_it = all(not tensor.is_cuda or _is_hopper_or_blackwell(tensor.device) for tensor in tensors)
    return has_it and all(start % 16 == 0 for start in starts)


def multiply_(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, beta: float) -> None:
    """cuBLAS adds products of 16 bits to float32 without rounding them first."""
    torch.addmm(out_NM, a_NK, b_KM, beta=beta, out_dtype=torch.float32, out=out_NM)


def grouped_product(x: Tensor, weight_EOI: Tensor, ends_E: Tensor, transpose: bool, backend: str) -> Tensor:
    """torch's grouped_mm."""
    assert _grouped_mm is not None
    return _grouped_mm(x, weight_EOI.transpose(1, 2) if transpose else weight_EOI, offs=ends_E)


def add_rows_(out_VH: Tensor, ids_N: Tensor, values_NH: Tensor) -> None:
    """Sorts the rows first; index_add_ adds with atomics, in another order each time."""
    out_VH.index_put_((ids_N,), values_NH, accumulate=True)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Only kernels of 16 bits take grouped heads; for others torch would build the whole S x S matrix."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def attention_block(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention."""
    out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False)
    return out, logsumexp


def attention_block_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward pass."""
    nothing = torch.empty(0, dtype=torch.int64, device=query.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, logsumexp.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
        nothing, nothing,
    )  # fmt: skip
