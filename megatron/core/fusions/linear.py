"""The three products of a linear layer, y = x W^T, for one weight and for those of all experts.

    forward           y  = x W^T
    data gradient     dx = dy W
    weight gradient   dW = dy^T x, straight into the buffer that accumulates it

Whatever multiplies by a weight of the model does it here: a form in another precision is a kernel for these products.
N rows (tokens), I and O the widths of input and output; R rows sorted by expert, E experts.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import forms
from megatron.core.fusions.forms import operation
from megatron.core.fusions.weight_gradient import deliver
from megatron.core.waiting import to_host, waiting

Backend = Literal["auto", "grouped_mm", "loop"]
WgradBackend = Literal["auto", "tiles", "persistent"]


@operation
def multiply_(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, beta: float) -> None:
    """out = beta * out + a b; a wider `out` gets sums that were not rounded first where a kernel can.

    The factors are of one type and have any strides. With beta 0 the old contents are ignored, NaN too.
    """
    if out_NM.dtype == a_NK.dtype:
        torch.addmm(out_NM, a_NK, b_KM, beta=beta, out=out_NM)
    else:
        product = torch.mm(a_NK, b_KM)
        out_NM.copy_(product) if beta == 0 else torch.add(product, out_NM, alpha=beta, out=out_NM)


def forward_product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T: [N, I] -> [N, O]."""
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])
    multiply_(x_NI, weight_OI.t(), y_NO, 0.0)
    return y_NO


def data_gradient(grad_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """dy W: [N, O] -> [N, I]."""
    grad_NI = grad_NO.new_empty(grad_NO.shape[0], weight_OI.shape[1])
    multiply_(grad_NO, weight_OI, grad_NI, 0.0)
    return grad_NI


def weight_gradient(weight_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> Tensor | None:
    """Delivers dy^T x; returns what a backward pass returns for the weight, see `deliver`."""
    return deliver(weight_OI, lambda out, beta: multiply_(grad_NO.t(), x_NI, out, beta))


@operation
def row_multiple(x: Tensor, weight_EOI: Tensor, backend: Backend) -> int:
    """What the number of every expert's rows is best a multiple of."""
    return 1


def ends_for_products(x: Tensor, weight_EOI: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """`ends_E` for all products of a layer: on the host if a loop makes them, which then waits for the device once."""
    return ends_E if forms.kernel("grouped_product", x, weight_EOI, ends_E, True, backend) else to_host(ends_E)


def _rows_of_experts(ends_E: Tensor) -> list[slice]:
    with waiting("the device"):
        ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@operation
def grouped_product(x: Tensor, weight_EOI: Tensor, ends_E: Tensor, transpose: bool, backend: Backend) -> Tensor:
    """x_r W_e^T with `transpose`, else x_r W_e, for the rows r of each expert e: [R, I] -> [R, O], or [R, O] -> [R, I].

    `ends_E` (int32) holds the end of each expert's rows, and its last entry must be R. Experts without rows are
    allowed. `backend` says what multiplies: `auto` is grouped_mm on CUDA where it takes the operands in one kernel,
    `loop` is never grouped_mm. Without it each expert is a separate product, on a CPU all of them one C++ kernel
    where there is one.
    """
    matrices = weight_EOI.transpose(1, 2) if transpose else weight_EOI
    y = x.new_empty(x.shape[0], matrices.shape[2])
    for rows, matrix in zip(_rows_of_experts(ends_E), matrices, strict=True):
        multiply_(x[rows], matrix, y[rows], 0.0)
    return y


@operation
def grouped_weight_gradient_(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, beta: float) -> None:
    """out_e = beta * out_e + sum over the rows of expert e of grad_r^T x_r; exactly beta * out_e without rows."""
    for rows, out_OI in zip(_rows_of_experts(ends_E), out_EOI, strict=True):
        multiply_(grad_RO[rows].t(), x_RI[rows], out_OI, beta)


@operation
def grouped_weight_gradient_persistent_(
    grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, beta: float
) -> None:
    """`grouped_weight_gradient_` by a kernel that computes one tile after another, where there is one."""
    grouped_weight_gradient_(grad_RO, x_RI, ends_E, out_EOI, beta)


def takes_persistent(weight_EOI: Tensor, out_EOI: Tensor) -> bool:
    """Whether there is such a kernel here for the gradient of this weight, added to `out_EOI`."""
    grad_RO, x_RI = (weight_EOI.new_empty(1, width) for width in weight_EOI.shape[1:])
    ends_E = torch.ones(weight_EOI.shape[0], dtype=torch.int32, device=weight_EOI.device)
    return forms.kernel("grouped_weight_gradient_persistent_", grad_RO, x_RI, ends_E, out_EOI, 1.0) is not None


def wgrad_operation(backend: WgradBackend) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], None]:
    """The operation that `backend` stands for; `auto` is `tiles`."""
    return grouped_weight_gradient_persistent_ if backend == "persistent" else grouped_weight_gradient_


def grouped_weight_gradient(
    weight_EOI: Tensor, grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, backend: WgradBackend = "auto"
) -> Tensor | None:
    """`weight_gradient` for all experts."""
    add_ = wgrad_operation(backend)
    return deliver(weight_EOI, lambda out, beta: add_(grad_RO, x_RI, ends_E, out, beta))


class _Linear(Function):
    """Computes in `dtype`, keeps its operands as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.dtype = weight, dtype
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        return forward_product(x_NI, weight.to(dtype)).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad_NO = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = data_gradient(grad_NO, weight.to(ctx.dtype)).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(weight, grad_NO, x.reshape(-1, x.shape[-1]).to(ctx.dtype))
        return grad_x, grad_weight, None


def linear(x: Tensor, weight_OI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x W^T, computed and returned in `dtype`, by default that of x: [..., I] -> [..., O]."""
    return _Linear.apply(x, weight_OI, dtype or x.dtype)
