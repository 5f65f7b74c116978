"""The products of all experts in one call."""

import torch
import torch.nn.functional as F
from torch import Tensor

_grouped_mm = getattr(F, "grouped_mm", None)


def _library_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm accepts these operands: no float64, and rows aligned to 16 bytes."""
    if _grouped_mm is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (10, 0):
        return False  # there the weight gradient of an expert without rows is not zero (pytorch issue 172439)
    return all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])


def grouped_gemm(x_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """x W_e^T for the rows of each expert e: x [R, I], weight [E, O, I] -> [R, O].

    `offsets_E` (int32) holds the end of each expert's rows, and its last entry must be R. Experts without rows are
    allowed; the gradient of their weights is zero.
    """
    if _library_takes(x_RI, weight_EOI):
        assert _grouped_mm is not None
        y = _grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=offsets_E)
        # grouped_mm's backward refuses a gradient with zero strides, which a later sum() or expand() would hand it
        return _ContiguousGradient.apply(y)
    ends = offsets_E.tolist()
    rows = x_RI.split([end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)])
    return torch.cat([F.linear(part, weight) for part, weight in zip(rows, weight_EOI, strict=True)])


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        # an empty tensor counts as contiguous whatever its strides
        return (
            grads[0].contiguous()
            if grads[0].numel()
            else torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        )
