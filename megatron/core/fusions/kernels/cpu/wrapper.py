"""The functions of the C++ extension on tensors, with the names and arguments of the operations they stand for.

T tokens, K experts a token, R rows, H hidden, F width of an expert, N tokens, V columns of logits. Operands must be
contiguous unless it is said otherwise.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from megatron.core.fusions.kernels.cpu.sources import checksum
from megatron.core.fusions.kernels.library.cpu import blocks
from megatron.core.fusions.stored import Stored


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why there is none."""
    try:
        extension = importlib.import_module("megatron.core.fusions.kernels.cpu.kernels_cpp")
    except ModuleNotFoundError:
        return None, "not compiled when the package was installed"
    except ImportError as error:
        return None, f"not loaded: {error}"
    if checksum() != extension.SOURCES:
        return None, "compiled from other sources: install the package again"
    if not extension.shares_threads():
        # torch on macOS has another OpenMP: on one thread of its own the extension would be slower than torch
        return None, "does not find torch's threads"
    return extension, ""


kernels_cpp, MISSING = _load()
_PARTIAL_SUMS = 32
"""Pieces of rows that the gradient of a norm's weight is summed in; fixed, so that the threads do not show."""


def instruction_set() -> str:
    """The instruction set in use, best of those that this processor has; empty without the extension."""
    return "" if kernels_cpp is None else kernels_cpp.instruction_set()


def _call(operation: str, tensor: Tensor, *arguments: object) -> None:
    name = f"{operation}_{str(tensor.dtype).removeprefix('torch.')}"
    getattr(kernels_cpp, name)(*arguments, torch.get_num_threads())


def _check(*tensors: Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors), [tensor.stride() for tensor in tensors]


def swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """[R, 2F], float32 [R] -> [R, F]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    _check(gate_up, probs)
    _call("swiglu", y, gate_up.data_ptr(), probs.data_ptr(), y.data_ptr(), rows, width)
    return y


def swiglu_backward(grad: Tensor, gate_up: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate_up and probs, and the output."""
    rows, width = grad.shape
    grad_gate_up, grad_probs, y = torch.empty_like(gate_up), torch.empty_like(probs), torch.empty_like(grad)
    _check(grad, gate_up, probs)
    tensors = (grad, gate_up, probs, grad_gate_up, grad_probs, y)
    _call("swiglu_backward", y, *(tensor.data_ptr() for tensor in tensors), rows, width)
    return grad_gate_up, grad_probs, y


def gather_pairs(x_TH: Tensor, row_to_pair_R: Tensor, top_k: int) -> Tensor:
    """[T, H], int64 [R] -> [R, H]."""
    y_RH = x_TH.new_empty(row_to_pair_R.shape[0], x_TH.shape[1])
    _check(x_TH, row_to_pair_R)
    _call("gather", x_TH, x_TH.data_ptr(), row_to_pair_R.data_ptr(), y_RH.data_ptr(), *y_RH.shape, top_k)
    return y_RH


def combine_pairs(y_RH: Tensor, pair_to_row_TK: Tensor) -> Tensor:
    """[R, H], int64 [T, K] -> [T, H]."""
    tokens, top_k = pair_to_row_TK.shape
    x_TH = y_RH.new_empty(tokens, y_RH.shape[1])
    _check(y_RH, pair_to_row_TK)
    _call("combine", y_RH, y_RH.data_ptr(), pair_to_row_TK.data_ptr(), x_TH.data_ptr(), *x_TH.shape, top_k)
    return x_TH


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """[..., H], [H] -> the normalised x, and 1 / rms of each row [..., 1] in float32."""
    y, inverse_rms = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _check(x, weight)
    tensors = (x, weight, y, inverse_rms)
    _call("rms_norm", x, *(tensor.data_ptr() for tensor in tensors), inverse_rms.numel(), x.shape[-1], epsilon)
    return y, inverse_rms


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weight in float32."""
    rows, width = inverse_rms.numel(), x.shape[-1]
    piece_rows = max(1, -(-rows // _PARTIAL_SUMS))
    grad_x, partial = torch.empty_like(x), torch.zeros(-(-rows // piece_rows), width)
    _check(grad, x, weight, inverse_rms)
    tensors = (grad, x, weight, inverse_rms, grad_x, partial)
    _call("rms_norm_backward", x, *(tensor.data_ptr() for tensor in tensors), rows, width, piece_rows)
    return grad_x, partial.sum(dim=0)


def softmax_statistics_(logits_NV: Tensor, ids_N: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exponentials and the target's logit, float32 [N]; the logits become their softmax."""
    largest, total, target = torch.empty(3, logits_NV.shape[0]).unbind()
    _check(logits_NV, ids_N)
    tensors = (logits_NV, ids_N, largest, total, target)
    _call("softmax_statistics", logits_NV, *(tensor.data_ptr() for tensor in tensors), *logits_NV.shape, columns)
    return largest, total, target


def softmax_gradient_(
    softmax_NV: Tensor, own_logsumexp_N: Tensor, ids_N: Tensor, logsumexp_N: Tensor, grad_N: Tensor, columns: int
) -> None:
    """Overwrites the softmax of these columns with the gradient of the logits."""
    tensors = (softmax_NV, own_logsumexp_N, ids_N, logsumexp_N, grad_N)
    _check(*tensors)
    _call("softmax_gradient", softmax_NV, *(tensor.data_ptr() for tensor in tensors), *softmax_NV.shape, columns)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x [B, heads, S, d], any strides but the last, float32 tables [S, d/2] or [B, S, d/2] -> the same, contiguous."""
    y = x.new_empty(x.shape)
    assert x.stride(-1) == 1, x.stride()
    _check(cos, sin)
    shape = (*x.shape[:3], x.shape[3] // 2)
    table_stride = cos.stride(0) if cos.ndim == 3 else 0
    tensors = (x, cos, sin, y)
    addresses = (tensor.data_ptr() for tensor in tensors)
    _call("rotary", x, *addresses, shape, x.stride()[:3], table_stride, -1.0 if inverse else 1.0)
    return y


def attention_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal: query [B, h, S, d], key and value [B, g, S, d], any strides but the last -> [B, h, S, d], lse [B, h, S].

    The output lies in memory as [S, B, h, d], which is what the next product wants.
    """
    batch, heads, length, width = query.shape
    out = query.new_empty(length, batch, heads, width).permute(1, 2, 0, 3)
    logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
    tensors = (query, key, value, out)
    assert all(tensor.stride(-1) == 1 for tensor in tensors), [tensor.stride() for tensor in tensors]
    strides = [tensor.stride()[:3] for tensor in (*tensors, out)]
    addresses = (tensor.data_ptr() for tensor in (*tensors, logsumexp))
    _call("attention", query, *addresses, (batch, heads, key.shape[1], length, width), strides)
    return out, logsumexp


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = torch.zeros(2, *query.shape).unbind()
    tensors = (query, key, value, out, grad)
    assert all(tensor.stride(-1) == 1 for tensor in tensors), [tensor.stride() for tensor in tensors]
    operands = (grad, query, key, value, out, logsumexp, grad_query, grad_key, grad_value)
    strides = [tensor.stride()[:3] for tensor in tensors]
    sizes = (batch, heads, groups, length, width)
    _call("attention_backward", query, *(tensor.data_ptr() for tensor in operands), sizes, strides)
    by_group = (part.view(batch, groups, -1, length, width).sum(dim=2) for part in (grad_key, grad_value))
    grad_key, grad_value = (part.to(query.dtype) for part in by_group)
    return grad_query, grad_key, grad_value


_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int16: 4}
"""What types.h calls the ways in which numbers are kept, by the type of their data."""


def _stored(stored: Stored) -> tuple[int, int, int, int, bool]:
    parts = (stored.data, stored.exponents, stored.weights)
    _check(*(part for part in parts if part is not None))
    data, exponents, weights = (0 if part is None else part.data_ptr() for part in parts)
    return _STORAGE[stored.data.dtype], data, exponents, weights, stored.positive


def adamw_(
    master: Stored, exp_avg: Stored, exp_avg_sq: Stored, grad: Tensor, step: Sequence[float], weights: Tensor | None
) -> None:
    """One update of flat pieces [n] with AdamWStep's numbers, gradients and weights of any type but float16."""
    kept = [_stored(each) for each in (master, exp_avg, exp_avg_sq, Stored(grad))]
    if weights is not None:
        _check(weights)
    address = 0 if weights is None else weights.data_ptr()
    assert kernels_cpp is not None
    kernels_cpp.adamw(*kept, address, grad.numel(), step, torch.get_num_threads())


def rows_lie_together(out: Tensor) -> bool:
    """Whether the elements of each row are neighbours in memory."""
    return out.stride(1) == 1 or out.shape[1] <= 1


def _packable(operand: Tensor) -> Tensor:
    """The matrix with rows or columns that lie together, which tiles are packed from."""
    return operand if operand.dtype == torch.float32 or 1 in operand.stride() else operand.contiguous()


def multiply_all(products: Sequence[tuple[Tensor, Tensor, Tensor]], beta: float) -> None:
    """out = beta * out + a b for each (a, b, out), all of the same types, sums in float32, in one parallel section.

    Rows of `out` lie together. The outputs must not overlap. With beta 0 their old contents are ignored, NaN too.
    """
    arguments = []
    types = (products[0][0].dtype, products[0][1].dtype, products[0][2].dtype)
    operands = [(_packable(a), _packable(b), out) for a, b, out in products]  # what is copied lives until the call ends
    for a, b, out in operands:
        assert (a.dtype, b.dtype, out.dtype) == types, (a.dtype, b.dtype, out.dtype, types)
        assert a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1]), (a.shape, b.shape, out.shape)
        assert rows_lie_together(out), out.stride()
        addresses = ((a.data_ptr(), *a.stride()), (b.data_ptr(), *b.stride()), (out.data_ptr(), out.stride(0)))
        arguments.append((*addresses, (a.shape[0], a.shape[1], b.shape[1]), beta))
    narrow, wide = (str(dtype).removeprefix("torch.") for dtype in (types[0], types[2]))
    getattr(kernels_cpp, f"multiply_{narrow}_{wide}")(arguments, torch.get_num_threads())


def multiply_(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, beta: float) -> None:
    """out = beta * out + a b."""
    multiply_all([(a_NK, b_KM, out_NM)], beta)


def _rows_of_experts(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def grouped_product(x: Tensor, weight_EOI: Tensor, ends_E: Tensor, transpose: bool, backend: str) -> Tensor:
    """All experts in one parallel section, whatever the backend."""
    matrices = weight_EOI.transpose(1, 2) if transpose else weight_EOI
    y = x.new_empty(x.shape[0], matrices.shape[2])
    by_expert = zip(_rows_of_experts(ends_E), matrices, strict=True)
    multiply_all([(x[rows], matrix, y[rows]) for rows, matrix in by_expert], 0.0)
    return y


def grouped_weight_gradient_(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, beta: float) -> None:
    """The same for the gradients of the weights."""
    by_expert = zip(_rows_of_experts(ends_E), out_EOI, strict=True)
    multiply_all([(grad_RO[rows].t(), x_RI[rows], out) for rows, out in by_expert], beta)


def vocabulary_blocks(weight_VH: Tensor, tokens: int) -> list[slice]:
    """2^22 logits: tiles write past the caches anyway, and fewer blocks are less work between them."""
    return blocks(weight_VH.shape[0], max(2**22 // max(1, tokens), 128))
