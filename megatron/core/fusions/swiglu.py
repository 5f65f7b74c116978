"""SwiGLU (arXiv:2002.05202) with the routing probability multiplied in, and its gradient.

R rows, F width. Multiplying by p here equals multiplying the expert's output by it, since the second product has no
bias, and saves keeping that output for the backward pass. Neither function is differentiable by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions.forms import operation


@operation
def swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """silu(gate) * up * p in float32 or wider: gate_up [R, 2F] (gate, then up), probs [R] -> [R, F] like gate_up."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up * probs.unsqueeze(-1)).to(gate_up.dtype)


@operation
def swiglu_backward(grad: Tensor, gate_up: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the output's gradient [R, F]: those of gate_up [R, 2F] and probs [R], and the output itself [R, F]."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    grad, prob = grad.to(gate.dtype), probs.unsqueeze(-1)
    sigmoid, silu = gate.sigmoid(), F.silu(gate)
    # d silu(g) / dg = s + g s (1 - s), s the sigmoid
    grad_gate = grad * prob * up * (sigmoid + silu * (1 - sigmoid))
    grad_gate_up = torch.cat((grad_gate, grad * prob * silu), dim=-1)
    grad_probs = (grad * silu * up).sum(dim=-1).to(probs.dtype)
    return grad_gate_up.to(gate_up.dtype), grad_probs, (silu * up * prob).to(gate_up.dtype)
