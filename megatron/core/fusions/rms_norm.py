"""Root-mean-square layer normalisation (arXiv:1910.07467)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions.forms import operation
from megatron.core.fusions.weight_gradient import deliver_tensor


@operation
def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The normalised x [..., H], and 1 / rms of each row [..., 1] in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (weight * (wide * inverse_rms).to(x.dtype)).to(x.dtype), inverse_rms


@operation
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its type, and of the weight, in float32 or wider."""
    grad, normalized = grad.to(inverse_rms.dtype), x.to(inverse_rms.dtype) * inverse_rms
    grad_weight = (grad * normalized).reshape(-1, x.shape[-1]).sum(dim=0)
    grad = grad * weight
    # y = x / rms(x): dx = (dy - y mean(dy y)) / rms(x)
    grad_x = (grad - normalized * (grad * normalized).mean(dim=-1, keepdim=True)) * inverse_rms
    return grad_x.to(x.dtype), grad_weight


class _RMSNorm(Function):
    """Keeps x, the weight and one number a row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        y, inverse_rms = rms_norm_forward(x, weight, epsilon)
        ctx.save_for_backward(x, inverse_rms)
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, inverse_rms = ctx.saved_tensors
        grad_x, grad_weight = rms_norm_backward(grads[0].contiguous(), x, ctx.weight, inverse_rms)
        return grad_x, deliver_tensor(ctx.weight, grad_weight) if ctx.needs_input_grad[1] else None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis: [..., H] -> [..., H], in x's type.

    The statistics are computed in float32, or float64 for float64 input.
    """
    return _RMSNorm.apply(x, weight, epsilon)
