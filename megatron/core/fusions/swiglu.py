"""SwiGLU (arXiv:2002.05202) with the routing probability multiplied in."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """silu(gate) * up * p in float32 or wider: gate_up [R, 2F] (gate, then up), probs [R] -> [R, F] in gate_up's type.

    Multiplying by p here equals multiplying the expert's output by it, since the second product has no bias, and saves
    keeping that output for the backward pass.
    """
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up * probs.unsqueeze(-1)).to(gate_up.dtype)
