"""Which form of an operation runs: the table of all kernels, and the only place that looks at the machine.

An operation is a formula in PyTorch, and the formula runs anywhere. The first kernel in its row of TABLE that is there
and takes the arguments runs in its place; `tools/show_forms.py` prints which, and why not the others.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from megatron.core.fusions.kernels import Kernel, by_library, in_cpp, in_triton, instruction_set, load, refusal
from megatron.core.fusions.kernels.library import cpu, cuda, meta
from megatron.core.fusions.kernels.library.cuda import takes_grouped_mm, wants_grouped_mm

Formula = TypeVar("Formula", bound=Callable[..., Any])
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _is_grouped(x: Tensor, weight: Tensor, ends: Tensor, transpose: bool, backend: str) -> bool:
    return wants_grouped_mm(x, backend) and x.shape[0] > 0 and takes_grouped_mm(x.dtype, *weight.shape[1:])


def _multiplies(a: Tensor, b: Tensor, *_: Any) -> bool:
    return a.dtype == b.dtype and instruction_set() in {FP32: ("amx", "avx512"), BF16: ("amx",)}.get(a.dtype, ())


def _fits_tiles(a: Tensor, b: Tensor, out: Tensor, beta: float) -> bool:
    return a.dtype == BF16 and a.shape[1] > 0 and (out.stride(1) == 1 or out.shape[1] <= 1) and _multiplies(a, b)


def _is_short(query: Tensor, *_: Any) -> bool:
    longest = 4096 if (query.dtype, instruction_set()) == (BF16, "amx") else 1024
    return instruction_set() in ("amx", "avx512") and 0 < query.shape[2] <= longest


def _widens(a: Tensor, b: Tensor, out: Tensor, beta: float) -> bool:
    return a.dtype in (BF16, FP16) and out.dtype == FP32 and out.is_contiguous()


def _is_described(grad: Tensor, x: Tensor, ends: Tensor, out: Tensor, beta: float) -> bool:
    return _widens(grad, x, out, beta) and beta in (0, 1) and x.shape[0] > 0 and cuda.takes_descriptors(grad, x, out)


# What a kernel asks of the arguments besides device and types, in words and as a function of them. C++ runs where it is
# faster than the libraries: products in float32 need AVX-512 for that, in bfloat16 the tile registers of AMX.
_ONE_TYPE = "input and weight of one type", lambda *args: args[-3].dtype == args[-2].dtype
_TABLES = "float32 tables", lambda x, cos, *_: cos.dtype == FP32
_PROBS = "float32 probabilities", lambda *args: args[-1].dtype == FP32
_REAL = "columns that are not padding", lambda x, *args: x.shape[0] > 0 and args[-1] > 0
_MASTERS = "float32 masters", lambda master, *_: master.dtype == FP32
_SHORT = "at most 1024 positions with AVX-512, 4096 in bfloat16 with AMX", _is_short
_FLASH = "16 bits, heads of 8, 16 ... 256", lambda q, *_: q.dtype in (BF16, FP16) and q.shape[-1] in range(8, 257, 8)
_WHOLE = "types that no kernel with grouped heads takes", lambda q, *_: q.dtype not in (BF16, FP16)
_TILES = "bfloat16 with AMX", _fits_tiles
_BROAD = "float32, over 1024 long", lambda a, b, out, _: a.dtype == out.dtype == FP32 and max(out.shape) > cpu.MAX_WIDTH
_ADDED = "16 bits into float32, where torch can", lambda *args: cuda.ADDS_TO_FLOAT32 and _widens(*args)
_WIDENED = "16 bits into float32", _widens
_GRADIENT = "gradients in float32 or as wide", lambda grad, x, ends, out, beta: out.dtype in (FP32, grad.dtype)
_DESCRIBED = "16 bits into float32, rows in 16 bytes, beta 0 or 1, on an H100 or B200", _is_described
_ALIGNED = "rows in 16 bytes, in bfloat16 on an H100 or B200 or where --moe-grouped-gemm-backend asks", _is_grouped
_ASKED = "--moe-grouped-gemm-backend grouped_mm", lambda *args: args[-1] == "grouped_mm" and _is_grouped(*args)
_SETS = "float32 with AVX-512, bfloat16 with AMX"
_PRODUCTS = _SETS, _multiplies
_SUMS = _SETS, lambda grad, x, ends, out, beta: out.dtype in (grad.dtype, FP32) and _multiplies(grad, x)
_NARROW = "bfloat16 with AMX", lambda weight, _: weight.dtype == BF16 and _multiplies(weight, weight)
_ONEDNN = "16 bits, by oneDNN", lambda x, w, b: x.dtype.itemsize == 2 and (b == "grouped_mm" or not _multiplies(x, w))

TABLE: dict[str, tuple[Kernel, ...]] = {
    "rms_norm_forward": (in_triton("rms_norm"), in_cpp(*_ONE_TYPE)),
    "rms_norm_backward": (in_triton("rms_norm"), in_cpp(*_ONE_TYPE)),
    "rotate": (in_triton("rotary"), in_cpp(*_TABLES)),
    "swiglu": (in_triton("swiglu"), in_cpp(*_PROBS)),
    "swiglu_backward": (in_triton("swiglu"), in_cpp(*_PROBS)),
    "route_forward": (in_triton("router"),),
    "route_backward": (in_triton("router"),),
    "sort_pairs": (in_triton("permute"),),
    "gather_pairs": (in_triton("permute"), in_cpp()),
    "combine_pairs": (in_triton("permute"), in_cpp()),
    "softmax_statistics_": (in_triton("cross_entropy"), in_cpp(*_REAL)),
    "softmax_gradient_": (in_triton("cross_entropy"), in_cpp(*_REAL)),
    "add_rows_": (by_library("cuda"),),
    "adamw_": (in_triton("adamw", *_MASTERS), in_cpp(*_MASTERS)),
    "attention_forward": (in_cpp(*_SHORT),),
    "attention_backward": (in_cpp(),),
    "attend": (by_library("cuda", *_WHOLE),),
    "attend_documents": (by_library("cuda", *_FLASH, module="packed"),),
    "attention_block": (by_library("cuda", *_FLASH), by_library("cpu")),
    "attention_block_backward": (by_library("cuda", *_FLASH), by_library("cpu")),
    "multiply_": (
        in_cpp(*_TILES), by_library("cpu", *_BROAD), by_library("cuda", *_ADDED), in_triton("grouped_gemm", *_WIDENED),
    ),
    "grouped_product": (by_library("cuda", *_ALIGNED), by_library("cpu", *_ASKED), in_cpp(*_PRODUCTS)),
    "grouped_weight_gradient_": (in_triton("grouped_gemm", *_GRADIENT), in_cpp(*_SUMS)),
    "grouped_weight_gradient_persistent_": (in_triton("persistent_gradient", *_DESCRIBED),),
    "row_multiple": (by_library("cpu", *_ONEDNN),),
    "vocabulary_blocks": (in_cpp(*_NARROW), by_library("cpu")),
}  # fmt: skip
TABLE |= {name: (*row, by_library("meta")) for name, row in TABLE.items() if hasattr(meta, name)}


def kernel(operation: str, *arguments: Any) -> Callable[..., Any] | None:
    """What runs instead of the operation's formula, or None."""
    for candidate in TABLE[operation]:
        if not refusal(candidate, arguments):
            return getattr(load(candidate.module), operation)
    return None


def operation(formula: Formula) -> Formula:
    """Makes a formula an operation: with arguments that a kernel of its name takes, that runs instead."""

    @functools.wraps(formula)
    def run(*arguments: Any) -> Any:
        return (kernel(formula.__name__, *arguments) or formula)(*arguments)

    return cast(Formula, run)
