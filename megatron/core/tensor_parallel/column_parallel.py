"""The product with a weight whose rows are split, and its backward, which hides the communication behind products.

With sequence parallelism only this rank's slice of the input is kept for the backward pass, which gathers the whole
again while it computes the gradient of the input (arXiv:2205.05198, section 4.2.2). The sum of that gradient over the
ranks then runs while the gradient of the weight is computed.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from megatron.core import collectives
from megatron.core.fusions.linear import data_gradient, forward_product, linear, weight_gradient
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel import mappings


class _ColumnParallelLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.group, ctx.sequence_parallel = weight, group, sequence_parallel
        whole = mappings.all_gather_first(x, group) if sequence_parallel else x
        return forward_product(whole.flatten(0, -2), weight).view(*whole.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x,), weight, group = ctx.saved_tensors, ctx.weight, ctx.group
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_NO, shape = grads[0].flatten(0, -2), grads[0].shape[:-1]
        grad_x = grad_weight = gathering = summing = None
        if ctx.sequence_parallel and wants_weight:
            x, gathering = mappings.start_all_gather_first(x, group)
        if wants_x:
            grad_x = data_gradient(grad_NO, weight).view(*shape, weight.shape[1])
            if ctx.sequence_parallel:
                grad_x, summing = mappings.start_reduce_scatter_first(grad_x, group)
            else:
                summing = collectives.all_reduce(grad_x, group=group.handle, async_op=True)
        if gathering is not None:
            collectives.wait(gathering)
        if wants_weight:
            grad_weight = weight_gradient(weight, grad_NO, x.flatten(0, -2))
        if summing is not None:
            collectives.wait(summing)
        return grad_x, grad_weight, None, None


def column_parallel_linear(x: Tensor, weight: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """x W^T with this rank's rows of W: x [S, B, H] (or [S/tp, B, H]), weight [O/tp, H] -> [S, B, O/tp].

    The gradient of x is summed over the ranks. A group of one is an ordinary product.
    """
    if group.size == 1:
        return linear(x, weight)
    return _ColumnParallelLinear.apply(x, weight, group, sequence_parallel)
