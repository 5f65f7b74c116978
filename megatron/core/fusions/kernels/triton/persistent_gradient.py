"""Weight gradients of all experts for H100 and B200: what is done to the main gradient is hidden behind products.

`grouped_gemm` computes the same, a tile a program. There nothing multiplies while a tile of the main gradient is read,
added to and written, for which a thread needs more registers than it has. Here

- a program computes one tile after another, and the loads of the next tile begin before a tile ends (`flatten`);
- tensor descriptors load and store (TMA), so that no thread computes addresses or masks; those of an expert's rows end
  where the expert does, and what lies behind reads as zero whatever is there;
- tiles are added to the main gradient by the memory's own units (`atomic_add` of a descriptor is TMA's reduction),
  while the next products run: no multiprocessor waits for what was there before. One program adds once to an element
  in a launch, so there is no order that could vary, and the bits are the same in every run;
- on a B200 other warps load and multiply than those that store (`warp_specialize`, which an H100 passes over).

R rows sorted by expert, O and I the width of the product's output and input.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.fusions.kernels.triton.grouped_gemm import LARGE_TILE, TILES_IN_A_GROUP

# One stage more than where threads copy: the quarter of a tile that is stored takes 32 KiB, four stages 192, of 227.
TILE = LARGE_TILE | {"num_stages": 4}


@triton.jit
def _halves(tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    return tl.reshape(tile, (HEIGHT, 2, WIDTH // 2)).permute(0, 2, 1).split()


@triton.jit
def _deliver(main_grads, row, column, part, ADDS: tl.constexpr):
    if ADDS:
        main_grads.atomic_add([row, column], part)
    else:
        main_grads.store([row, column], part)


@triton.jit
def _accumulate_persistently(
    grad_ptr, x_ptr, ends_ptr, main_grad_ptr, out_width, in_width,
    ADDS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    if (end > begin) | (not ADDS):
        # a descriptor has a row at least; an expert without rows reads none
        grads = tl.make_tensor_descriptor(grad_ptr, [tl.maximum(end, 1), out_width], [out_width, 1], [ROWS, OUT])
        xs = tl.make_tensor_descriptor(x_ptr, [tl.maximum(end, 1), in_width], [in_width, 1], [ROWS, IN])
        main_grads = tl.make_tensor_descriptor(
            main_grad_ptr + expert.to(tl.int64) * out_width * in_width,
            [out_width, in_width], [in_width, 1], [OUT, IN // 4],
        )  # fmt: skip
        # programs that run at the same time share columns of both operands, which then stay in the L2 cache
        out_tiles, in_tiles = tl.cdiv(out_width, OUT), tl.cdiv(in_width, IN)
        for tile in tl.range(
            tl.program_id(0), out_tiles * in_tiles, tl.num_programs(0), flatten=True, warp_specialize=True
        ):
            group = tile // (GROUP * in_tiles)
            first = group * GROUP
            height = tl.minimum(out_tiles - first, GROUP)
            within = tile - group * GROUP * in_tiles
            out_column = (first + within % height) * OUT
            in_column = (within // height) * IN
            total = tl.zeros((OUT, IN), tl.float32)
            for row in range(begin, end, ROWS):
                total = tl.dot(grads.load([row, out_column]).T, xs.load([row, in_column]), total)
            # in quarters, for which there is shared memory next to the operands of the next products
            left, right = _halves(total, OUT, IN)
            first_part, second_part = _halves(left, OUT, IN // 2)
            third_part, fourth_part = _halves(right, OUT, IN // 2)
            _deliver(main_grads, out_column, in_column, first_part, ADDS)
            _deliver(main_grads, out_column, in_column + IN // 4, second_part, ADDS)
            _deliver(main_grads, out_column, in_column + IN // 2, third_part, ADDS)
            _deliver(main_grads, out_column, in_column + 3 * (IN // 4), fourth_part, ADDS)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def grouped_weight_gradient_persistent_(
    grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, main_grad_EOI: Tensor, beta: float
) -> None:
    """With beta 0 or 1, at least one row, and rows of all three that begin at multiples of 16 bytes.

    `grad_RO` and `x_RI` are of one type of 16 bits, the main gradient is float32.
    """
    experts, out_width, in_width = main_grad_EOI.shape
    tiles = triton.cdiv(out_width, TILE["OUT"]) * triton.cdiv(in_width, TILE["IN"])

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=x_RI.device)

    # descriptors lie in memory of the device; what Triton allocates it with is kept for each thread, and autograd has
    # threads of its own
    triton.set_allocator(scratch)
    _accumulate_persistently[(min(tiles, _multiprocessors(x_RI.device)), experts)](
        grad_RO, x_RI, ends_E, main_grad_EOI, out_width, in_width, ADDS=beta != 0, GROUP=TILES_IN_A_GROUP, **TILE
    )
