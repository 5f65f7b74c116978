"""All experts of a rank as one operation, from its tokens to the weighted sums of their outputs.

T tokens, K experts a token, R rows sorted by expert, H hidden, F width of an expert on this rank. For the backward pass
only x [T, H], the inner products h [R, 2F], the probabilities and the permutation are kept: rows of x are gathered
again, activations computed again, and the experts' outputs are not needed since the probabilities are multiplied in
before the second product.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import weight_gradient
from megatron.core.fusions.grouped_gemm import Backend, add_weight_gradient, grouped_product
from megatron.core.fusions.native import kernels as native
from megatron.core.fusions.permute import PermutationMap, align_rows, combine, gather, gather_weights, scatter_weights
from megatron.core.fusions.swiglu import swiglu, swiglu_backward

NARROW_ROWS = 32
"""Rows of an expert are a multiple of this where oneDNN multiplies (16 bits on a CPU): it makes a kernel for each
number of rows it meets, which takes longer than the product. 16 was no faster."""


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
    ) -> Tensor:
        ends_E, probs_R = index.offsets_E, gather_weights(probs_TK, index)
        h_RF = grouped_product(gather(x_TH, index), gate_up, ends_E, transpose=True, backend=backend)
        y_RH = grouped_product(swiglu(h_RF, probs_R), down, ends_E, transpose=True, backend=backend)
        ctx.save_for_backward(x_TH, h_RF, probs_R, index.row_to_pair_R, index.pair_to_row_TK, ends_E)
        ctx.bijective, ctx.gate_up, ctx.down, ctx.backend = index.bijective, gate_up, down, backend
        return combine(y_RH, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None, None]:
        x_TH, h_RF, probs_R, row_to_pair, pair_to_row, ends_E = ctx.saved_tensors
        index = PermutationMap(row_to_pair, pair_to_row, ends_E, ctx.bijective)
        gate_up, down = ctx.gate_up, ctx.down
        grad_RH = gather(grads[0], index)
        grad_a_RF = grouped_product(grad_RH, down, ends_E, transpose=False, backend=ctx.backend)
        grad_h_RF, grad_probs_R, a_RF = swiglu_backward(grad_a_RF, h_RF, probs_R)
        grad_down = weight_gradient.deliver(
            down, lambda out, beta: add_weight_gradient(grad_RH, a_RF, ends_E, out, beta)
        )
        grad_rows_RH = grouped_product(grad_h_RF, gate_up, ends_E, transpose=False, backend=ctx.backend)
        rows_RH = gather(x_TH, index)
        grad_gate_up = weight_gradient.deliver(
            gate_up, lambda out, beta: add_weight_gradient(grad_h_RF, rows_RH, ends_E, out, beta)
        )
        return combine(grad_rows_RH, index), scatter_weights(grad_probs_R, index), None, grad_gate_up, grad_down, None


def expert_mlp(
    x_TH: Tensor,
    probs_TK: Tensor,
    index: PermutationMap,
    gate_up: Tensor,
    down: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """sum_k p_tk W2_e (silu(G_e x_t) * U_e x_t) over the experts e = e_tk that are here: x [T, H] -> [T, H].

    Args:
        x_TH: tokens.
        probs_TK: weights of their choices.
        index: the rows of those (token, choice) pairs whose expert is here.
        gate_up: [experts, 2F, H], gate then up.
        down: [experts, H, F].
        backend: what makes the products, see grouped_product.
    """
    by_library = backend == "grouped_mm" or not native.multiplies(x_TH, gate_up)
    if x_TH.device.type == "cpu" and x_TH.dtype.itemsize == 2 and by_library:
        index = align_rows(index, NARROW_ROWS)
    return _ExpertMLP.apply(x_TH, probs_TK, index, gate_up, down, backend)
