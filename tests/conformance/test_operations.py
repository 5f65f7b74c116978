"""Operation x form x type: outputs and every gradient against the formula in float64.

The formulas themselves are compared with their definitions in tests/unit/core/fusions.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from closeness import BOUNDS
from conformance_testing import (
    FORMS,
    assert_close,
    device_of,
    drawn,
    each,
    form_parameters,
    has_descriptors,
    only,
)
from torch import Tensor

from megatron.core.fusions.attention import causal_attention
from megatron.core.fusions.attention_block import attention_block, attention_block_backward
from megatron.core.fusions.cross_entropy import softmax_gradient_, softmax_statistics
from megatron.core.fusions.embedding import lookup
from megatron.core.fusions.expert_mlp import expert_mlp
from megatron.core.fusions.forms import TABLE
from megatron.core.fusions.linear import (
    grouped_product,
    grouped_weight_gradient_,
    grouped_weight_gradient_persistent_,
    linear,
)
from megatron.core.fusions.permute import align_rows, combine_rows, gather_probs, gather_rows, permutation_map
from megatron.core.fusions.rms_norm import rms_norm
from megatron.core.fusions.rotary import apply_rotary, rotary_tables
from megatron.core.fusions.router import top_k_routing
from megatron.core.fusions.swiglu import swiglu, swiglu_backward
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.cross_entropy import output_cross_entropy

Outputs = tuple[Tensor, ...]


class Case(NamedTuple):
    """A function of tensors of the given shapes; those after `wide` stay in float32 or wider."""

    function: Callable[..., Outputs]
    shapes: tuple[tuple[int, ...], ...]
    wide: int = 99
    bound: float = 1.0
    """Factor on the bound of the type."""


def _norm(x: Tensor, weight: Tensor) -> Outputs:
    return (rms_norm(x.transpose(0, 1), weight, 1e-5),)


def _rotary(x: Tensor) -> Outputs:
    # read out of a wider tensor with the sequence first, as it lies in the product's output
    x = x.permute(1, 2, 0, 3)[..., x.shape[-1] // 2 :]
    batch, _, length, width = x.shape
    shared = rotary_tables(torch.arange(length, device=x.device), width, 1e4, x.dtype)
    own = rotary_tables(torch.arange(batch * length, device=x.device).view(batch, -1) % 7, width, 1e4, x.dtype)
    return apply_rotary(x, *shared), apply_rotary(x, *own)


def _swiglu(grad: Tensor, gate_up: Tensor, probs: Tensor) -> Outputs:
    probs = probs.detach().sigmoid()
    return (swiglu(gate_up.detach(), probs), *swiglu_backward(grad.detach(), gate_up.detach(), probs))


def _router(top_k: int) -> Callable[..., Outputs]:
    def route(logits: Tensor) -> Outputs:
        routing = top_k_routing(logits, top_k)
        outputs = (routing.probs_TK, routing.softmax_TE, routing.logsumexp_T)
        return (*outputs, routing.experts_TK.double(), routing.tokens_per_expert_E)

    return route


def _softmax(columns: int) -> Callable[..., Outputs]:
    def run(logits: Tensor, grad: Tensor, elsewhere: Tensor) -> Outputs:
        ids = torch.arange(logits.shape[0], device=logits.device) * 7 % (columns + 4) - 2  # some elsewhere
        logits = 4 * logits.detach()
        statistics = softmax_statistics(logits, ids, columns)
        if columns:
            softmax_gradient_(
                logits,
                statistics.logsumexp,
                ids,
                statistics.logsumexp + elsewhere.detach().abs(),
                grad.detach(),
                columns,
            )
            assert not logits[:, columns:].any()
            return (*statistics, logits)
        assert statistics.largest.isneginf().all() and not statistics.total.any()
        return (statistics.target,)

    return run


def _permutation(top_k: int, here: int, multiple: int) -> Callable[..., Outputs]:
    """Experts 0 and those from `here` + 1 on are on other ranks."""

    def run(x_TH: Tensor, scores_TE: Tensor, probs_TK: Tensor) -> Outputs:
        experts = scores_TE.detach().topk(top_k).indices - 1
        index = permutation_map(experts, here, int(((experts >= 0) & (experts < here)).sum()))
        index = align_rows(index, multiple)
        rows = gather_rows(x_TH, index)
        empty = (index.row_to_pair_R < 0).unsqueeze(1)
        combined = combine_rows(rows.masked_fill(empty, float("nan")) * 2, index)  # what is in empty rows stays out
        maps = (index.row_to_pair_R.double(), index.pair_to_row_TK.double(), index.offsets_E.double())
        return rows, combined, gather_probs(probs_TK, index), *maps

    return run


def _experts(backend: str) -> Callable[..., Outputs]:
    def run(x_TH: Tensor, gate_up: Tensor, down: Tensor, scores_TE: Tensor, probs_TK: Tensor) -> Outputs:
        scores_TE = scores_TE.detach().clone()
        scores_TE[:, 1] -= 100  # chosen by no token
        index = permutation_map(scores_TE.topk(probs_TK.shape[1]).indices, gate_up.shape[0])
        return (expert_mlp(x_TH, probs_TK.sigmoid(), index, gate_up, down * 0.2, backend),)  # type: ignore[arg-type]

    return run


def _grouped(*counts: int) -> Callable[..., Outputs]:
    def run(x: Tensor, grad: Tensor, weight: Tensor, before: Tensor) -> Outputs:
        x, grad, weight = x.detach(), grad.detach(), weight.detach()
        ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
        outputs = [grouped_product(x, weight, ends, True, "auto"), grouped_product(grad, weight, ends, False, "auto")]
        empty = [expert for expert, count in enumerate(counts) if not count]
        for add_ in (grouped_weight_gradient_, grouped_weight_gradient_persistent_):
            for beta in (0.0, 1.0, 0.5):
                out = before.detach().clone() if beta else torch.full_like(before, float("nan"))
                add_(grad, x, ends, out, beta)
                assert torch.equal(out[empty], beta * before.detach()[empty])
                outputs.append(out)
        return tuple(outputs)

    return run


def _linear(x: Tensor, weight: Tensor) -> Outputs:
    return (linear(x, weight),)


def _linear_with_sink(x: Tensor, weight: Tensor, before: Tensor) -> Outputs:
    main_grad, weight = before.detach().clone(), weight.detach().clone().requires_grad_()
    weight.gradient_sink = lambda write: write(main_grad, 1.0)  # type: ignore[attr-defined]
    linear(x.detach(), weight).square().sum().backward()
    assert weight.grad is None
    return (main_grad,)


def _output_layer(x: Tensor, weight: Tensor) -> Outputs:
    targets = torch.arange(x.shape[0], device=x.device) * 3 % 40
    return (output_cross_entropy(x, weight, targets, 40, Group(), False),)


def _lookup(weight: Tensor) -> Outputs:
    ids = torch.arange(15, device=weight.device).view(5, 3) * 4 % (weight.shape[0] - 2)
    return (lookup(ids, weight),)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Outputs:
    return (causal_attention(query, key, value.permute(1, 2, 0, 3)),)


def _block(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Outputs:
    query, key, value, grad = (part.detach() for part in (query, key, value, grad))
    outputs: list[Tensor] = []
    for causal in (False, True):
        keys = query.shape[2] if causal else key.shape[2]
        out, logsumexp = attention_block(query, key[:, :, :keys], value[:, :, :keys], causal)
        operands = (grad, query, key[:, :, :keys], value[:, :, :keys], out, logsumexp, causal)
        outputs += [out, logsumexp, *attention_block_backward(*operands)]
    return tuple(outputs)


def _experts_shapes(tokens: int, experts: int, top_k: int, hidden: int, width: int) -> tuple[tuple[int, ...], ...]:
    weights = ((experts, 2 * width, hidden), (experts, hidden, width))
    return ((tokens, hidden), *weights, (tokens, experts), (tokens, top_k))


def _grouped_shapes(counts: tuple[int, ...], out: int, inner: int) -> tuple[tuple[int, ...], ...]:
    weight = (len(counts), out, inner)
    return ((sum(counts), inner), (sum(counts), out), weight, weight)


_COUNTS = ((0, 0, 0), (3, 0, 70), (0, 1, 64), (65, 7, 0), (0, 1, 7, 0, 127, 129, 400, 0))
_ROWS = ((0, 8), (1, 1), (3, 7), (7, 33), (13, 600), (130, 129), (5, 4099))

CASES: dict[str, Case] = {
    **{
        f"norm {r}x{w}": Case(_norm, ((r, 1, w), (w,)))
        for r, w in ((0, 8), (1, 2), (7, 13), (131, 512), (520, 40), (2, 5000))
    },
    "norm of transposed rows": Case(_norm, ((5, 3, 24), (24,))),
    **{
        f"rotary {length}x{batch}x{heads}x{width}": Case(_rotary, ((length, batch, heads, 2 * width),), bound=4)
        for length, batch, heads, width in ((1, 1, 1, 2), (5, 2, 3, 12), (7, 2, 9, 16))
    },
    **{f"swiglu {r}x{w}": Case(_swiglu, ((r, w), (r, 2 * w), (r,)), wide=2) for r, w in _ROWS},
    **{
        f"router {t} tokens {e} experts top {k}": Case(_router(k), ((t, e),), wide=0)
        for t, e, k in ((0, 4, 2), (1, 8, 2), (67, 5, 1), (131, 8, 2), (64, 4, 4), (37, 130, 8))
    },
    **{
        f"softmax {r}x{w}, {c} real": Case(_softmax(c), ((r, w), (r,), (r,)), wide=1)
        for r, w, c in ((0, 8, 8), (3, 5, 5), (37, 1, 1), (37, 40, 1), (37, 1024, 1000), (7, 4100, 4097), (2, 16, 0))
    },
    **{
        f"permutation {t} tokens {e} experts top {k}, {h} here": Case(
            _permutation(k, h, m), ((t, w), (t, e), (t, k)), wide=1
        )
        for t, e, k, h, w, m in (
            (0, 4, 2, 2, 8, 1), (1, 5, 1, 3, 33, 1), (127, 5, 1, 4, 8, 4), (77, 6, 2, 3, 33, 1), (13, 4, 2, 3, 1030, 4),
            (65, 7, 7, 5, 8, 16), (77, 140, 3, 129, 8, 1),
        )
    },
    **{
        f"experts, {backend}, {shape}": Case(_experts(backend), _experts_shapes(*shape), wide=3, bound=2)
        for backend in ("auto", "loop", "grouped_mm")
        for shape in ((0, 4, 2, 16, 8), (1, 4, 2, 16, 8), (13, 5, 2, 24, 8), (131, 5, 2, 64, 48), (31, 4, 1, 32, 24))
    },
    **{f"grouped {counts}": Case(_grouped(*counts), _grouped_shapes(counts, 72, 40), wide=3) for counts in _COUNTS},
    "grouped, wide": Case(_grouped(65, 0, 7), _grouped_shapes((65, 0, 7), 144, 272), wide=3),
    # four tiles an expert, none of them whole
    "grouped, of 8": Case(_grouped(65, 0, 1), _grouped_shapes((65, 0, 1), 136, 264), wide=3),
    "linear": Case(_linear, ((9, 3, 64), (48, 64))),
    "linear, many columns": Case(_linear, ((33, 40), (1500, 40))),
    "linear, one row": Case(_linear, ((1, 40), (8, 40))),
    "linear with a sink": Case(_linear_with_sink, ((33, 40), (24, 40), (24, 40)), wide=2),
    "output layer": Case(_output_layer, ((13, 24), (48, 24)), bound=2),
    "lookup": Case(_lookup, ((11, 4),)),
    **{
        f"attention {s}x{d}, {g} groups": Case(_attention, ((2, 4, s, d), (2, g, s, d), (s, 2, g, d)), bound=2.5)
        for s, g, d in ((2, 1, 24), (5, 4, 24), (96, 2, 24), (97, 2, 24), (300, 1, 24), (600, 2, 64))
    },
    "attention to a block": Case(_block, ((2, 6, 20, 8), (2, 3, 33, 8), (2, 3, 33, 8), (2, 6, 20, 8)), bound=2.5),
}  # fmt: skip


def _inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    types = [torch.float32 if number >= case.wide else dtype for number in range(len(case.shapes))]
    return [drawn(*shape, dtype=kind, seed=i) for i, (shape, kind) in enumerate(zip(case.shapes, types, strict=True))]


def _run(case: Case, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients of the inputs for upstream gradients that do not depend on the outputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = case.function(*leaves)
    upstream = [drawn(*out.shape, dtype=dtype, seed=100 + number) for number, out in enumerate(outputs)]
    pairs = [(out, grad.to(out)) for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad]
    torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [tensor.detach().cpu() for tensor in (*outputs, *grads)]


MET: dict[str, set[str]] = {form: set() for form in FORMS}
"""The operations whose kernels of a form ran, on the device of tests that run on any machine."""


@cache
def _reference(name: str, dtype: torch.dtype) -> list[Tensor]:
    """The formula's results in float64, which all forms are compared with."""
    with only("formula"):
        return _run(CASES[name], [tensor.double() for tensor in _inputs(CASES[name], dtype)], dtype)


HEAVY = (
    "norm 520x40", "grouped, wide", "grouped (0, 1, 7, 0, 127", "experts, auto, (131", "permutation 65 tokens",
    "permutation 77 tokens", "permutation 127 tokens",
)  # fmt: skip
"""Beginnings of cases that take seconds in Triton's interpreter; their float16 has smaller ones in the default run."""


def _is_slow(name: str, form: str, dtype: torch.dtype, device: str) -> bool:
    """Whether a case shows in Triton's interpreter little that others do not show."""
    if form != "triton" or device != "cpu":
        return False
    # the backend chooses the products, which Triton's form leaves to torch: its kernels are the same for each
    if name.startswith(("experts, loop", "experts, grouped_mm")):
        return True
    return dtype == torch.float16 and name.startswith(HEAVY)


def _cases() -> list[object]:
    """(name, form, dtype, device) of every case in every form."""
    made: list[object] = []
    for parameter in form_parameters():
        for name in CASES:
            slow = [pytest.mark.slow] if _is_slow(name, *parameter.values) else []
            values, marks = (name, *parameter.values), [*parameter.marks, *slow]
            made.append(pytest.param(*values, id=f"{parameter.id}-{name}", marks=marks))
    return made


@pytest.mark.parametrize(("name", "form", "dtype", "device"), _cases())
def test_equals_the_formula_in_float64(name: str, form: str, dtype: torch.dtype, device: str) -> None:
    case = CASES[name]
    inputs = _inputs(case, dtype)
    with only(form) as used:
        ours = _run(case, [tensor.to(device) for tensor in inputs], dtype)
    if form != "formula" and not used:
        pytest.skip("no kernel of this form takes part")
    if device == device_of(form):
        MET[form] |= used
    reference = _reference(name, dtype)
    assert len(ours) == len(reference)
    for mine, expected in zip(ours, reference, strict=True):
        assert_close(mine, expected, case.bound * max(BOUNDS[mine.dtype], BOUNDS[dtype]))


def _operations(part: str) -> set[str]:
    return {name for name, row in TABLE.items() if any(kernel.part == part for kernel in row)}


OF_FORM = {
    # the optimizer's kernel is in test_adamw.py
    "triton": _operations("triton") - {"adamw_"},
    "amx": _operations("cpu") - {"adamw_"},
    "avx512": _operations("cpu") - {"adamw_", "multiply_", "vocabulary_blocks"},
    "library": _operations("library.cpu"),
}


@pytest.mark.parametrize("form", each(*OF_FORM))
def test_every_kernel_meets_a_case(form: str) -> None:
    backward = {name for name in OF_FORM[form] if name.endswith("_backward")}
    absent = set() if has_descriptors() else {"grouped_weight_gradient_persistent_"}
    wanted = OF_FORM[form] - backward - absent
    # the comparisons above met them, if they ran in this process; otherwise small cases run first, until all are met
    by_size = sorted(CASES, key=lambda name: sum(map(math.prod, CASES[name].shapes)))
    for name, dtype in itertools.product(by_size, FORMS[form]):
        if wanted <= MET[form]:
            return
        with only(form) as used:
            CASES[name].function(*(tensor.to(device_of(form)) for tensor in _inputs(CASES[name], dtype)))
        MET[form] |= used
    assert wanted <= MET[form]
