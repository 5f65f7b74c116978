"""Root-mean-square layer normalisation (arXiv:1910.07467)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import backend
from megatron.core.fusions.native import kernels as native


class _RMSNorm(Function):
    """Keeps x, the weight and one number a row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if backend.runs_triton(x, weight):
            from megatron.core.fusions.kernels import rms_norm as kernels

            x = x.contiguous()
            y, inverse_rms = kernels.forward(x, weight, epsilon)
            ctx.save_for_backward(x, weight, inverse_rms)
            return y
        if backend.runs_native(x, weight) and x.dtype == weight.dtype:
            x = x.contiguous()
            y, inverse_rms = native.rms_norm(x, weight, epsilon)
            ctx.save_for_backward(x, weight, inverse_rms)
            return y
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse_rms)
        return weight * (wide * inverse_rms).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        if backend.runs_triton(x, weight):
            from megatron.core.fusions.kernels import rms_norm as kernels

            grad_x, grad_weight = kernels.backward(grads[0].contiguous(), x, weight, inverse_rms)
            return grad_x, grad_weight.to(weight.dtype), None
        if backend.runs_native(x, weight) and x.dtype == weight.dtype:
            grad_x, grad_weight = native.rms_norm_backward(grads[0].contiguous(), x, weight, inverse_rms)
            return grad_x, grad_weight.to(weight.dtype), None
        normalized = x.to(inverse_rms.dtype) * inverse_rms
        grad = grads[0].to(inverse_rms.dtype)
        grad_weight = (grad * normalized).flatten(0, -2).sum(dim=0).to(weight.dtype)
        grad = grad * weight
        # y = x / rms(x): dx = (dy - y mean(dy y)) / rms(x)
        grad_x = (grad - normalized * (grad * normalized).mean(dim=-1, keepdim=True)) * inverse_rms
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis: [..., H] -> [..., H], in x's type.

    The statistics are computed in float32, or float64 for float64 input.
    """
    return _RMSNorm.apply(x, weight, epsilon)
