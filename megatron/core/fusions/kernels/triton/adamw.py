"""AdamW: every number is read and written once, in the type that it is kept in, and computed with in float32.

The formulas are in `megatron.core.fusions.stored`. 16-bit numbers other than float16 come as their bits: bfloat16 and
FP8 are converted with integers, which every GPU can, and halves of a weight are rounded away from zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.fusions.stored import BLOCK, Stored

ROWS = 16
"""Blocks with a scale of a program."""

# How numbers are kept; those from _SCALED on have scales.
_BF16, _REMAINDER, _FP16, _FP8 = (tl.constexpr(number) for number in (1, 2, 3, 4))
_SCALED = _FP16
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.int16: 2, torch.float16: 3, torch.uint8: 4}


@triton.jit
def _from_bf16(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _to_bf16(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _upper_half(x):
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, (bits + 0x8000) >> 16).to(tl.int16)


@triton.jit
def _from_fp8(bits):
    size = bits.to(tl.int32) & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    x = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)  # 2^-9
    return tl.where(bits.to(tl.int32) < 0x80, x, -x)


@triton.jit
def _to_fp8(x):
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # what is added to 2^14 is rounded to a multiple of 2^-9
    subnormal = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _read(ptr, exponents_ptr, weights_ptr, at, block, inside, KEPT: tl.constexpr):
    raw = tl.load(ptr + at, mask=inside, other=0)
    if KEPT == _BF16:
        x = _from_bf16(raw)
    elif KEPT == _REMAINDER:
        upper = tl.load(weights_ptr + at, mask=inside, other=0).to(tl.int32) << 16
        x = (upper + raw.to(tl.int32)).to(tl.float32, bitcast=True)
    elif KEPT >= _SCALED:
        exponent = tl.load(exponents_ptr + block, mask=tl.sum(inside.to(tl.int32), axis=1) > 0, other=0)
        scale = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)[:, None]
        if KEPT == _FP8:
            x = _from_fp8(raw) * scale
        else:
            x = raw.to(tl.float32) * scale
    else:
        x = raw.to(tl.float32)
    return x


@triton.jit
def _write(x, ptr, exponents_ptr, weights_ptr, at, block, inside, KEPT: tl.constexpr, POSITIVE: tl.constexpr):
    if KEPT == _BF16:
        tl.store(ptr + at, _to_bf16(x), mask=inside)
    elif KEPT == _REMAINDER:
        bits = x.to(tl.int32, bitcast=True)
        tl.store(weights_ptr + at, _upper_half(x), mask=inside)
        tl.store(ptr + at, tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0, bits).to(tl.int16), mask=inside)
    elif KEPT >= _SCALED:
        HALF: tl.constexpr = 1 << 19 if KEPT == _FP8 else 1 << 12
        BIAS: tl.constexpr = 7 if KEPT == _FP8 else 15
        LOWEST: tl.constexpr = 10 if KEPT == _FP8 else 25
        MOST: tl.constexpr = 448.0 if KEPT == _FP8 else 65504.0
        kept = tl.where(inside, x, 0.0)
        largest = tl.max(tl.abs(kept), axis=1).to(tl.int32, bitcast=True)
        exponent = tl.maximum(((largest + HALF) >> 23) - BIAS, LOWEST)
        any_inside = tl.sum(inside.to(tl.int32), axis=1) > 0
        tl.store(exponents_ptr + block, exponent.to(tl.uint8), mask=any_inside)
        scaled = kept * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        scaled = tl.minimum(tl.maximum(scaled, -MOST), MOST)
        if KEPT == _FP8:
            bits = _to_fp8(scaled)
        else:
            bits = scaled.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        if POSITIVE:
            bits = tl.where((kept > 0) & (bits == 0), 1, bits)
        if KEPT == _FP8:
            tl.store(ptr + at, bits.to(tl.uint8), mask=inside)
        else:
            tl.store(ptr + at, bits.to(tl.int16).to(tl.float16, bitcast=True), mask=inside)
    else:
        tl.store(ptr + at, x, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _update(
    master_ptr, upper_ptr, exp_avg_ptr, exp_avg_exponents_ptr, exp_avg_sq_ptr, exp_avg_sq_exponents_ptr, grad_ptr,
    weights_ptr, count, beta1, beta2, other1, other2, factor, rate, root, kept, epsilon,
    MASTER: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr, GRAD: tl.constexpr, WEIGHTS: tl.constexpr,
    POSITIVE: tl.constexpr, POSITIVE_SQ: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WHOLE:  # then a mask is the same for a whole block, whose numbers are loaded several at once
        inside = tl.broadcast_to((block * BLOCK < count)[:, None], (ROWS, BLOCK))
    else:
        inside = at < count
    w = _read(master_ptr, master_ptr, upper_ptr, at, block, inside, MASTER)
    m = _read(exp_avg_ptr, exp_avg_exponents_ptr, exp_avg_ptr, at, block, inside, EXP_AVG)
    v = _read(exp_avg_sq_ptr, exp_avg_sq_exponents_ptr, exp_avg_sq_ptr, at, block, inside, EXP_AVG_SQ)
    g = _read(grad_ptr, grad_ptr, grad_ptr, at, block, inside, GRAD) * factor
    m = beta1 * m + other1 * g
    v = beta2 * v + other2 * g * g
    w = kept * w - tl.div_rn(rate * m, tl.sqrt_rn(v) * root + epsilon)
    _write(w, master_ptr, master_ptr, upper_ptr, at, block, inside, MASTER, False)
    _write(m, exp_avg_ptr, exp_avg_exponents_ptr, exp_avg_ptr, at, block, inside, EXP_AVG, POSITIVE)
    _write(v, exp_avg_sq_ptr, exp_avg_sq_exponents_ptr, exp_avg_sq_ptr, at, block, inside, EXP_AVG_SQ, POSITIVE_SQ)
    if WEIGHTS == _BF16:
        tl.store(weights_ptr + at, _upper_half(w), mask=inside)
    elif WEIGHTS == _FP16:
        tl.store(weights_ptr + at, w.to(tl.float16), mask=inside)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def adamw_(
    master: Stored, exp_avg: Stored, exp_avg_sq: Stored, grad: Tensor, step: Sequence[Any], weights: Tensor | None
) -> None:
    """One update of flat pieces [n] with AdamWStep's numbers; masters in float32 or as remainders."""
    number, learning_rate, beta1, beta2, epsilon, weight_decay, factor = step
    count = grad.numel()
    if not count:
        return
    rate, root = learning_rate / (1 - beta1**number), (1 - beta2**number) ** -0.5
    kept = 1 - learning_rate * weight_decay
    numbers = (beta1, beta2, 1 - beta1, 1 - beta2, factor, rate, root, kept, epsilon)
    upper = master.data if master.weights is None else master.weights
    scales = [stored.data if stored.exponents is None else stored.exponents for stored in (exp_avg, exp_avg_sq)]
    _update[(triton.cdiv(count, ROWS * BLOCK),)](
        master.data, _bits(upper), _bits(exp_avg.data), _bits(scales[0]), _bits(exp_avg_sq.data), _bits(scales[1]),
        _bits(grad), master.data if weights is None else _bits(weights), count,
        *map(float, numbers),
        MASTER=_NUMBERS[master.data.dtype], EXP_AVG=_NUMBERS[exp_avg.data.dtype],
        EXP_AVG_SQ=_NUMBERS[exp_avg_sq.data.dtype], GRAD=_NUMBERS[grad.dtype],
        WEIGHTS=_NUMBERS[torch.float32 if weights is None else weights.dtype],
        POSITIVE=exp_avg.positive, POSITIVE_SQ=exp_avg_sq.positive, WHOLE=count % BLOCK == 0, ROWS=ROWS, BLOCK=BLOCK,
    )  # fmt: skip
