"""Weight gradients of all experts, added straight into main gradients.

R rows sorted by expert, O and I the width of the product's output and input. Adding dW in bfloat16 afterwards would
write, read and write it again: for Mixtral 8x7B 16.9 GB a layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# What tensor cores take, 16 bits in rows that copies of 16 bytes fit. Elsewhere a tile of this size does not fit the
# registers, and in float32, where nothing may be rounded on the way, not even the shared memory of an A100.
LARGE_TILE = {"OUT": 128, "IN": 256, "ROWS": 64, "num_warps": 8, "num_stages": 3}
SMALL_TILE = {"OUT": 64, "IN": 64, "ROWS": 32, "num_warps": 4, "num_stages": 3}
TILES_IN_A_GROUP = 8


@triton.jit
def _accumulate_weight_gradient(
    grad_ptr, x_ptr, ends_ptr, main_grad_ptr, beta, out_width, in_width,
    READS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    # neighbouring programs share columns of both operands, which then stay in the L2 cache
    out_tiles, in_tiles = tl.cdiv(out_width, OUT), tl.cdiv(in_width, IN)
    group = tl.program_id(0) // (GROUP * in_tiles)
    first = group * GROUP
    height = tl.minimum(out_tiles - first, GROUP)
    within = tl.program_id(0) - group * GROUP * in_tiles
    out_column = (first + within % height) * OUT + tl.arange(0, OUT)
    in_column = (within // height) * IN + tl.arange(0, IN)

    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    end = tl.load(ends_ptr + expert).to(tl.int64)
    if (end > begin) | (beta != 1.0):
        total = tl.zeros((OUT, IN), tl.float32)
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            live = row < end
            grad = tl.load(
                grad_ptr + row[None, :] * out_width + out_column[:, None],
                mask=live[None, :] & (out_column < out_width)[:, None], other=0.0,
            )  # fmt: skip
            x = tl.load(
                x_ptr + row[:, None] * in_width + in_column[None, :],
                mask=live[:, None] & (in_column < in_width)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(grad, x, total, input_precision="ieee")
        place = expert.to(tl.int64) * out_width * in_width + out_column[:, None] * in_width + in_column[None, :]
        inside = (out_column < out_width)[:, None] & (in_column < in_width)[None, :]
        if READS:
            total += beta * tl.load(main_grad_ptr + place, mask=inside).to(tl.float32)
        tl.store(main_grad_ptr + place, total.to(main_grad_ptr.dtype.element_ty), mask=inside)


def grouped_weight_gradient_(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, main_grad_EOI: Tensor, beta: float) -> None:
    """Sums in float32; `grad_RO` and `x_RI` are of one type, the main gradient is of that or float32."""
    experts, out_width, in_width = main_grad_EOI.shape
    is_aligned = x_RI.dtype.itemsize == 2 and out_width % 16 == in_width % 16 == 0
    tile = LARGE_TILE if is_aligned else SMALL_TILE
    tiles = triton.cdiv(out_width, tile["OUT"]) * triton.cdiv(in_width, tile["IN"])
    _accumulate_weight_gradient[(tiles, experts)](
        grad_RO, x_RI, ends_E, main_grad_EOI, float(beta), out_width, in_width,
        READS=beta != 0, GROUP=TILES_IN_A_GROUP, **tile,
    )  # fmt: skip


def multiply_(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, beta: float) -> None:
    """out = beta * out + a b, as the weight gradient of one expert; the rows of `out` lie one after another."""
    end = torch.full((1,), a_NK.shape[1], dtype=torch.int32, device=a_NK.device)
    grouped_weight_gradient_(a_NK.t().contiguous(), b_KM.contiguous(), end, out_NM.unsqueeze(0), beta)
