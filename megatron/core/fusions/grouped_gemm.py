"""The products of all experts in one call, and the gradient of their weights.

R rows sorted by expert, E experts, I and O the widths of the product's input and output.
"""

import statistics
import time
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions import backend as dispatch
from megatron.core.fusions import product
from megatron.core.fusions.native import kernels as native

Backend = Literal["auto", "grouped_mm", "loop"]

_grouped_mm = getattr(F, "grouped_mm", None)


def takes_grouped_mm(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch has grouped_mm and it takes rows of these widths: they must be aligned to 16 bytes."""
    if _grouped_mm is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


def _uses_grouped_mm(x: Tensor, weight: Tensor, backend: Backend) -> bool:
    """On a CPU only if told so: there it is a loop as well, one that cannot write into a given tensor."""
    wanted = x.is_cuda if backend == "auto" else backend == "grouped_mm"
    return wanted and takes_grouped_mm(x.dtype, *weight.shape[1:])


def _rows_of_experts(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _multiply_all(products: list[tuple[Tensor, Tensor, Tensor]], beta: float) -> None:
    """out = beta * out + a b for each (a, b, out); on a CPU that is good at it all in one parallel section."""
    if native.multiplies(*products[0]):
        native.multiply(products, beta)
        return
    for a, b, out in products:
        product.multiply(a, b, out, beta)


def grouped_product(
    x: Tensor, weight_EOI: Tensor, ends_E: Tensor, *, transpose: bool, backend: Backend = "auto"
) -> Tensor:
    """x_r W_e^T with `transpose`, else x_r W_e, for the rows r of each expert e: [R, I] -> [R, O], or [R, O] -> [R, I].

    `ends_E` (int32) holds the end of each expert's rows, and its last entry must be R. Experts without rows are
    allowed. `backend` says what multiplies; by itself grouped_mm on CUDA, a loop elsewhere and for what grouped_mm
    does not take. Not differentiable by itself.
    """
    matrices = weight_EOI.transpose(1, 2) if transpose else weight_EOI
    if x.is_meta or not x.shape[0]:  # torch's own has no meta form for float32, and need not be asked for nothing
        return x.new_empty(x.shape[0], matrices.shape[2])
    if _uses_grouped_mm(x, weight_EOI, backend):
        assert _grouped_mm is not None
        return _grouped_mm(x, matrices, offs=ends_E)
    y = x.new_empty(x.shape[0], matrices.shape[2])
    _multiply_all([(x[r], matrix, y[r]) for r, matrix in zip(_rows_of_experts(ends_E), matrices, strict=True)], 0.0)
    return y


def add_weight_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, beta: float) -> None:
    """out_e = beta * out_e + sum over the rows of expert e of grad_r^T x_r; exactly beta * out_e without rows."""
    if out_EOI.is_meta:
        return  # there are no values, and no rows to be looped over
    if out_EOI.dtype == torch.float32 and dispatch.runs_triton(grad_RO, x_RI):
        from megatron.core.fusions.kernels import grouped_gemm as kernels

        if beta == 0:
            out_EOI.zero_()
        kernels.accumulate_weight_gradient(grad_RO, x_RI, ends_E, out_EOI)
        return
    by_expert = zip(_rows_of_experts(ends_E), out_EOI, strict=True)
    _multiply_all([(grad_RO[rows].t(), x_RI[rows], out) for rows, out in by_expert], beta)


def seconds_of_products(backend: Backend, gate_up_EFH: Tensor, down_EHF: Tensor, rows: int, repeat: int = 5) -> float:
    """Seconds of one layer's forward and data-gradient products, `rows` for each expert; the median of `repeat`.

    With the weights [E, 2F, H] and [E, H, F] of that layer. What the loop waits for the device, to know where each
    expert's rows end, is part of it.
    """
    experts, hidden, width = down_EHF.shape
    ends_E = torch.arange(1, experts + 1, dtype=torch.int32, device=down_EHF.device) * rows
    generator = torch.Generator(down_EHF.device).manual_seed(0)  # the run's own numbers are left alone
    x_RH = torch.empty(experts * rows, hidden, dtype=down_EHF.dtype, device=down_EHF.device)
    a_RF = torch.empty(experts * rows, width, dtype=down_EHF.dtype, device=down_EHF.device)
    for drawn in (x_RH, a_RF):
        drawn.normal_(generator=generator)

    def layer() -> None:
        h_RF = grouped_product(x_RH, gate_up_EFH, ends_E, transpose=True, backend=backend)
        y_RH = grouped_product(a_RF, down_EHF, ends_E, transpose=True, backend=backend)
        grouped_product(y_RH, down_EHF, ends_E, transpose=False, backend=backend)
        grouped_product(h_RF, gate_up_EFH, ends_E, transpose=False, backend=backend)

    def seconds(layers: int) -> float:
        start = time.perf_counter()
        for _ in range(layers):  # several on end, so that the device is kept as busy as in a model
            layer()
        if x_RH.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / layers

    with torch.no_grad():
        seconds(3)  # warms up
        return statistics.median(seconds(3) for _ in range(repeat))
