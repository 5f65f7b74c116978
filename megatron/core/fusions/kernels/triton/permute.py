"""Sorting tokens by expert without a sort, and moving rows, without atomics and without waiting for the device.

T tokens, K experts a token, P = T*K pairs, R rows of the experts' input, H width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PAIRS, MAX_NUMBERS = 128, 8192
BLOCK_COLUMNS = 1024


@triton.jit(do_not_specialize=["pairs"])
def _count(experts_ptr, partial_ptr, pairs, E: tl.constexpr, PAIRS: tl.constexpr, BLOCK_E: tl.constexpr):
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    expert = tl.arange(0, BLOCK_E)
    chosen = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1)
    counts = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
    # expert by expert, and within each block by block: its exclusive sum is where every block's rows begin
    tl.store(partial_ptr + expert * tl.num_programs(0) + block, counts, mask=expert < E)


@triton.jit(do_not_specialize=["pairs"])
def _place(
    experts_ptr, starts_ptr, row_to_pair_ptr, pair_to_row_ptr, pairs,
    E: tl.constexpr, PAIRS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    expert = tl.arange(0, BLOCK_E)
    live = pair < pairs
    chosen = tl.load(experts_ptr + pair, mask=live, other=-1)
    has_row = live & (chosen >= 0) & (chosen < E)
    is_chosen = (chosen[:, None] == expert[None, :]).to(tl.int32)
    earlier = tl.cumsum(is_chosen, axis=0) - is_chosen
    start = tl.load(starts_ptr + expert * tl.num_programs(0) + block, mask=expert < E, other=0).to(tl.int32)
    row = tl.sum(is_chosen * (earlier + start[None, :]), axis=1).to(tl.int64)
    tl.store(pair_to_row_ptr + pair, tl.where(has_row, row, -1), mask=live)
    tl.store(row_to_pair_ptr + row, pair.to(tl.int64), mask=has_row)


@triton.jit
def _gather(x_ptr, row_to_pair_ptr, out_ptr, width, K: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pair = tl.load(row_to_pair_ptr + row)
    values = tl.load(x_ptr + pair // K * width + column, mask=(column < width) & (pair >= 0), other=0.0)
    tl.store(out_ptr + row * width + column, values, mask=column < width)


@triton.jit
def _combine(y_ptr, pair_to_row_ptr, out_ptr, width, K: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(pair_to_row_ptr + token * K + k)
        values = tl.load(y_ptr + row * width + column, mask=(column < width) & (row >= 0), other=0.0)
        total += values.to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def sort_pairs(experts_TK: Tensor, num_experts: int, num_rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A stable counting sort: int64 row -> pair [R], int64 pair -> row [T, K], int32 ends [E]."""
    experts_TK = experts_TK.contiguous()
    pairs, device = experts_TK.numel(), experts_TK.device
    row_to_pair = torch.empty(pairs if num_rows is None else num_rows, dtype=torch.int64, device=device)
    pair_to_row = torch.empty_like(experts_TK)
    if not pairs:
        return row_to_pair, pair_to_row, torch.zeros(num_experts, dtype=torch.int32, device=device)
    block = triton.next_power_of_2(num_experts)
    # as many pairs as leave a number for each of them and each expert in registers
    pairs_of_block = max(1, min(MAX_PAIRS, MAX_NUMBERS // block))
    sizes = {"E": num_experts, "PAIRS": pairs_of_block, "BLOCK_E": block}
    blocks = triton.cdiv(pairs, pairs_of_block)
    partial = torch.empty((num_experts, blocks), dtype=torch.int32, device=device)
    _count[(blocks,)](experts_TK, partial, pairs, **sizes)
    ends = partial.view(-1).cumsum(dim=0)
    starts = ends - partial.view(-1)
    _place[(blocks,)](experts_TK, starts, row_to_pair, pair_to_row, pairs, **sizes)
    return row_to_pair, pair_to_row, ends[blocks - 1 :: blocks].to(torch.int32)


def gather_pairs(x_TH: Tensor, row_to_pair_R: Tensor, top_k: int) -> Tensor:
    """Row r is token `row_to_pair[r] // K`, or zero where that is negative: x [T, H] contiguous -> [R, H]."""
    rows, width = row_to_pair_R.numel(), x_TH.shape[1]
    out = x_TH.new_empty((rows, width))
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK_COLUMNS))
        _gather[grid](x_TH, row_to_pair_R, out, width, K=top_k, COLUMNS=BLOCK_COLUMNS)
    return out


def combine_pairs(y_RH: Tensor, pair_to_row_TK: Tensor) -> Tensor:
    """Sums each token's rows, those not negative, in float32: y [R, H] contiguous -> [T, H] in y's type."""
    (tokens, top_k), width = pair_to_row_TK.shape, y_RH.shape[1]
    out = y_RH.new_empty((tokens, width))
    if tokens:
        grid = (tokens, triton.cdiv(width, BLOCK_COLUMNS))
        _combine[grid](y_RH, pair_to_row_TK, out, width, K=top_k, COLUMNS=BLOCK_COLUMNS)
    return out
