"""All experts of a rank as one operation, from its tokens to the weighted sums of their outputs.

T tokens, K experts a token, R rows sorted by expert, H hidden, F width of an expert on this rank. For the backward pass
only x [T, H], the inner products h [R, 2F], the probabilities and the permutation are kept: rows of x are gathered
again, activations computed again, and the experts' outputs are not needed since the probabilities are multiplied in
before the second product.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions.linear import (
    Backend,
    WgradBackend,
    ends_for_products,
    grouped_product,
    grouped_weight_gradient,
    row_multiple,
)
from megatron.core.fusions.permute import PermutationMap, align_rows, combine, gather, gather_weights, scatter_weights
from megatron.core.fusions.swiglu import swiglu, swiglu_backward


class _ExpertMLP(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        probs_TK: Tensor,
        index: PermutationMap,
        gate_up: Tensor,
        down: Tensor,
        backend: Backend,
        wgrad_backend: WgradBackend,
    ) -> Tensor:
        probs_R, ends_E = gather_weights(probs_TK, index), ends_for_products(x_TH, down, index.offsets_E, backend)
        h_RF = grouped_product(gather(x_TH, index), gate_up, ends_E, True, backend)
        y_RH = grouped_product(swiglu(h_RF, probs_R), down, ends_E, True, backend)
        maps = (index.row_to_pair_R, index.pair_to_row_TK, index.offsets_E)
        ctx.save_for_backward(x_TH, h_RF, probs_R, ends_E, *maps)
        ctx.gate_up, ctx.down, ctx.backend, ctx.wgrad_backend = gate_up, down, backend, wgrad_backend
        return combine(y_RH, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, h_RF, probs_R, ends_E, *maps = ctx.saved_tensors
        index, gate_up, down = PermutationMap(*maps), ctx.gate_up, ctx.down
        grad_RH = gather(grads[0], index)
        grad_a_RF = grouped_product(grad_RH, down, ends_E, False, ctx.backend)
        grad_h_RF, grad_probs_R, a_RF = swiglu_backward(grad_a_RF, h_RF, probs_R)
        grad_down = None
        if ctx.needs_input_grad[4]:
            grad_down = grouped_weight_gradient(down, grad_RH, a_RF, index.offsets_E, ctx.wgrad_backend)
        grad_rows_RH = grouped_product(grad_h_RF, gate_up, ends_E, False, ctx.backend)
        grad_gate_up = None
        if ctx.needs_input_grad[3]:
            grad_gate_up = grouped_weight_gradient(
                gate_up, grad_h_RF, gather(x_TH, index), index.offsets_E, ctx.wgrad_backend
            )
        grad_x_TH, grad_probs_TK = combine(grad_rows_RH, index), scatter_weights(grad_probs_R, index)
        return grad_x_TH, grad_probs_TK, None, grad_gate_up, grad_down, None, None


def expert_mlp(
    x_TH: Tensor,
    probs_TK: Tensor,
    index: PermutationMap,
    gate_up: Tensor,
    down: Tensor,
    backend: Backend = "auto",
    wgrad_backend: WgradBackend = "auto",
) -> Tensor:
    """sum_k p_tk W2_e (silu(G_e x_t) * U_e x_t) over the experts e = e_tk that are here: x [T, H] -> [T, H].

    `index` has the rows of those (token, choice) pairs whose expert is here; gate_up [experts, 2F, H] is gate, then up,
    and down is [experts, H, F]. For the backends see `grouped_product` and `grouped_weight_gradient`.
    """
    if (multiple := row_multiple(x_TH, gate_up, backend)) > 1:
        index = align_rows(index, multiple)
    return _ExpertMLP.apply(x_TH, probs_TK, index, gate_up, down, backend, wgrad_backend)
