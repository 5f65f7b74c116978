"""The products of all experts in one call, and the gradient of their weights.

R rows sorted by expert, E experts, I and O the widths of the product's input and output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions import backend, weight_gradient

_grouped_mm = getattr(F, "grouped_mm", None)


def _library_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm is used: on CUDA, for rows aligned to 16 bytes.

    On a CPU it is a loop as well, one that cannot write into a given tensor.
    """
    if _grouped_mm is None or not x.is_cuda or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])


def _rows_of_experts(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def grouped_product(x: Tensor, weight_EOI: Tensor, ends_E: Tensor, *, transpose: bool) -> Tensor:
    """x_r W_e^T with `transpose`, else x_r W_e, for the rows r of each expert e: [R, I] -> [R, O], or [R, O] -> [R, I].

    `ends_E` (int32) holds the end of each expert's rows, and its last entry must be R. Experts without rows are
    allowed. Not differentiable by itself.
    """
    matrices = weight_EOI.transpose(1, 2) if transpose else weight_EOI
    if x.is_meta or not x.shape[0]:  # torch's own has no meta form for float32, and need not be asked for nothing
        return x.new_empty(x.shape[0], matrices.shape[2])
    if _library_takes(x, weight_EOI):
        assert _grouped_mm is not None
        return _grouped_mm(x, matrices, offs=ends_E)
    y = x.new_empty(x.shape[0], matrices.shape[2])
    for rows, matrix in zip(_rows_of_experts(ends_E), matrices, strict=True):
        torch.mm(x[rows], matrix, out=y[rows])
    return y


def add_weight_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, beta: float) -> None:
    """out_e = beta * out_e + sum over the rows of expert e of grad_r^T x_r; exactly beta * out_e without rows."""
    if out_EOI.is_meta:
        return  # there are no values, and no rows to be looped over
    if out_EOI.dtype == torch.float32 and backend.runs_triton(grad_RO, x_RI):
        from megatron.core.fusions.kernels import grouped_gemm as kernels

        if beta == 0:
            out_EOI.zero_()
        kernels.accumulate_weight_gradient(grad_RO, x_RI, ends_E, out_EOI)
        return
    for rows, out in zip(_rows_of_experts(ends_E), out_EOI, strict=True):
        weight_gradient.product(grad_RO[rows], x_RI[rows], out, beta)
