"""SwiGLU (arXiv:2002.05202) with the routing probability multiplied in, and its gradient.

R rows, F width. Multiplying by p here equals multiplying the expert's output by it, since the second product has no
bias, and saves keeping that output for the backward pass. Neither function is differentiable by itself.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions import backend
from megatron.core.fusions.native import kernels as native

# Rows are worked on in blocks of about this many elements, whose intermediate results stay in the processor's cache.
BLOCK_ELEMENTS = 2**19

aten = torch.ops.aten


def _blocks(gate_up: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, gate_up.shape[1]))
    return (slice(start, start + rows) for start in range(0, gate_up.shape[0], rows))


def swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """silu(gate) * up * p in float32 or wider: gate_up [R, 2F] (gate, then up), probs [R] -> [R, F] like gate_up."""
    if backend.runs_triton(gate_up, probs):
        from megatron.core.fusions.kernels import swiglu as kernels

        return kernels.forward(gate_up, probs)
    if backend.runs_native(gate_up) and probs.dtype == torch.float32:
        return native.swiglu(gate_up, probs)
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    y = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    for rows in _blocks(gate_up):
        gate, up = gate_up[rows].to(wide).chunk(2, dim=-1)
        out = y[rows] if y.dtype == wide else torch.empty_like(up, memory_format=torch.contiguous_format)
        aten.silu.out(gate, out=out).mul_(up).mul_(probs[rows].unsqueeze(-1))
        if y.dtype != wide:
            y[rows] = out
    return y


def swiglu_backward(grad: Tensor, gate_up: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the output's gradient [R, F]: those of gate_up [R, 2F] and probs [R], and the output itself [R, F]."""
    if backend.runs_triton(grad, gate_up, probs):
        from megatron.core.fusions.kernels import swiglu as kernels

        grad_gate_up, grad_probs, y = kernels.backward(grad.contiguous(), gate_up, probs)
        return grad_gate_up, grad_probs.to(probs.dtype), y
    if backend.runs_native(grad, gate_up) and probs.dtype == torch.float32:
        return native.swiglu_backward(grad.contiguous(), gate_up, probs)
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    grad_gate_up, y, grad_probs = torch.empty_like(gate_up), torch.empty_like(grad), torch.empty_like(probs)
    for rows in _blocks(gate_up):
        gate, up = gate_up[rows].to(wide).chunk(2, dim=-1)
        silu, prob, upstream = F.silu(gate), probs[rows].unsqueeze(-1), grad[rows].to(wide)
        unweighted = silu * up
        grad_probs[rows] = (upstream * unweighted).sum(dim=-1)
        torch.mul(unweighted, prob, out=y[rows])
        upstream = upstream * prob
        grad_gate, grad_up = grad_gate_up[rows].chunk(2, dim=-1)
        torch.mul(silu, upstream, out=grad_up)
        upstream.mul_(up)
        # d silu(g) / dg = s + g s (1 - s), s the sigmoid
        if grad_gate.dtype == wide:
            aten.silu_backward.grad_input(upstream, gate, grad_input=grad_gate)
        else:
            grad_gate.copy_(aten.silu_backward(upstream, gate))
    return grad_gate_up, grad_probs, y
