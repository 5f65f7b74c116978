"""SwiGLU (arXiv:2002.05202) with the routing probability multiplied in."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import backend


class _WeightedSwiGLU(Function):
    """Keeps only its inputs for the backward pass; autograd would keep every float32 step in between."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, probs: Tensor) -> Tensor:
        gate_up, probs = gate_up.contiguous(), probs.contiguous()
        ctx.save_for_backward(gate_up, probs)
        if backend.runs_triton(gate_up, probs):
            from megatron.core.fusions.kernels import swiglu as kernels

            return kernels.forward(gate_up, probs)
        gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
        return (F.silu(gate) * up * probs.unsqueeze(-1)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, probs = ctx.saved_tensors
        if backend.runs_triton(gate_up, probs):
            from megatron.core.fusions.kernels import swiglu as kernels

            grad_gate_up, grad_probs, _ = kernels.backward(grads[0].contiguous(), gate_up, probs)
            return grad_gate_up, grad_probs.to(probs.dtype)
        wide = torch.promote_types(gate_up.dtype, torch.float32)
        gate, up = gate_up.to(wide).chunk(2, dim=-1)
        grad = grads[0].to(wide)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        grad_probs = (grad * silu * up).sum(dim=-1).to(probs.dtype)
        grad = grad * probs.unsqueeze(-1)
        # d silu(g) / dg = s + g s (1 - s)
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        return torch.cat((grad_gate, grad * silu), dim=-1).to(gate_up.dtype), grad_probs


def weighted_swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """silu(gate) * up * p in float32 or wider: gate_up [R, 2F] (gate, then up), probs [R] -> [R, F] in gate_up's type.

    Multiplying by p here equals multiplying the expert's output by it, since the second product has no bias, and saves
    keeping that output for the backward pass.
    """
    return _WeightedSwiGLU.apply(gate_up, probs)
