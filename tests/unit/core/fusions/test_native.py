"""The C++ form of the operations, compiled for each instruction set, and their PyTorch form, against float64."""

import math
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core.fusions.grouped_gemm import add_weight_gradient, grouped_product
from megatron.core.fusions.native import kernels as native
from torch import Tensor

from megatron.core.fusions import product
from megatron.core.fusions.adamw import AdamWStep, adamw_
from megatron.core.fusions.attention import causal_attention
from megatron.core.fusions.cross_entropy import softmax_gradient_, softmax_statistics
from megatron.core.fusions.expert_mlp import NARROW_ROWS, expert_mlp
from megatron.core.fusions.permute import PermutationMap, align_rows, combine, gather, permutation_map
from megatron.core.fusions.rms_norm import rms_norm
from megatron.core.fusions.rotary import apply_rotary, rotary_tables
from megatron.core.fusions.swiglu import swiglu, swiglu_backward

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
SETS = native.kernels_cpp.instruction_sets() if native.kernels_cpp is not None else []


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


FORMS = ["PyTorch", "plain", "avx2", "avx512", "amx"]
in_cpp = pytest.mark.parametrize("form", FORMS[1:], indirect=True)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each form of the operations in turn; those that this machine does not have are skipped."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "kernels_cpp", None)
        monkeypatch.setattr(native, "FAST_PRODUCTS", False)
        monkeypatch.setattr(native, "FAST_NARROW_PRODUCTS", False)
        yield request.param
        return
    if request.param not in SETS:
        pytest.skip(f"no C++ form for {request.param} here")
    assert native.kernels_cpp is not None
    monkeypatch.setattr(native, "FAST_PRODUCTS", True)
    monkeypatch.setattr(native, "FAST_NARROW_PRODUCTS", request.param == "amx")
    native.kernels_cpp.choose_instruction_set(request.param)
    yield request.param
    native.kernels_cpp.choose_instruction_set(SETS[0])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    return ((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)).item()


def _compare(function: Callable[..., Tensor], *inputs: Tensor, bound: float) -> None:
    """Output and all gradients of `function` against its own in float64."""
    narrow = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, reference = function(*narrow), function(*wide)
    assert _error(out.detach(), reference.detach()) <= bound
    upstream = torch.randn_like(reference)
    grads = torch.autograd.grad(out, narrow, upstream.to(out.dtype))
    references = torch.autograd.grad(reference, wide, upstream.to(out.dtype).double())
    for number, (grad, expected) in enumerate(zip(grads, references, strict=True)):
        assert _error(grad, expected) <= bound, number


def test_the_extension_was_built_where_there_is_a_compiler() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert native.kernels_cpp is not None, "install the package again: the C++ source has changed, or did not compile"


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 7), (130, 129), (5, 4099)])
def test_swiglu(form: str, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up, grad, probs = _randn(rows, 2 * width, dtype=dtype), _randn(rows, width, dtype=dtype), torch.rand(rows)
    wide = (grad.double(), gate_up.double(), probs.double())
    assert _error(swiglu(gate_up, probs), swiglu(*wide[1:])) <= BOUNDS[dtype]
    for value, reference in zip(swiglu_backward(grad, gate_up, probs), swiglu_backward(*wide), strict=True):
        assert _error(value, reference) <= BOUNDS[dtype]


def test_swiglu_of_large_numbers_and_of_what_is_no_number(form: str) -> None:
    gate = torch.tensor([0.0, 30.0, -30.0, 90.0, -90.0, 1e4, -1e4, 1e30, math.nan])
    gate_up = torch.stack((gate, torch.ones_like(gate)), dim=1)
    expected = torch.nn.functional.silu(gate)
    torch.testing.assert_close(
        swiglu(gate_up, torch.ones(9)).squeeze(1), expected, rtol=1e-6, atol=1e-35, equal_nan=True
    )


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (7, 13), (131, 512), (2, 5000)])
def test_rms_norm(form: str, dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = _randn(rows, 1, width, dtype=dtype), _randn(width, dtype=dtype)
    _compare(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight, bound=BOUNDS[dtype])


@pytest.mark.parametrize("by_sample", [False, True])
def test_rotary(form: str, dtype: torch.dtype, by_sample: bool) -> None:
    x = _randn(9, 2, 3, 10, dtype=dtype).permute(1, 2, 0, 3)  # [B, heads, S, d], as it lies in the product's output
    positions = torch.randint(100, (2, 9)) if by_sample else torch.arange(9)
    tables = {d: rotary_tables(positions, 10, 1e4, d) for d in (torch.float32, torch.float64)}
    wide = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
    bound = 2e-5 if dtype == torch.float32 else BOUNDS[dtype]  # the angles are float32
    _compare(lambda x: apply_rotary(x, *tables[wide[x.dtype]]), x, bound=bound)


@pytest.mark.parametrize(("columns", "width"), [(1, 1), (7, 7), (1000, 1024), (1, 40)])
def test_softmax_and_its_gradient(form: str, dtype: torch.dtype, columns: int, width: int) -> None:
    logits, grad, elsewhere = (3 * _randn(37, width)).to(dtype), torch.randn(37), torch.rand(37) * 5
    ids = torch.randint(-3, columns + 3, (37,))  # some targets are in other columns
    results = []
    for kind in (dtype, torch.float64):
        statistics, kept = softmax_statistics(logits.to(kind).clone(), ids, columns)
        own = statistics.logsumexp
        softmax_gradient_(kept, own, ids, own + elsewhere.to(own.dtype), grad.to(own.dtype), columns)
        results.append((*statistics, kept))
    for value, reference in zip(*results, strict=True):
        assert _error(value, reference) <= BOUNDS[dtype]
    assert not results[0][3][:, columns:].any()


def test_softmax_of_logits_far_apart_and_of_what_is_no_number(form: str) -> None:
    logits = torch.tensor([[0.0, -1e30, -90.0], [1e30, 0.0, -1e30], [0.0, math.nan, 1.0], [-100.0, -300.0, -100.0]])
    statistics, kept = softmax_statistics(logits.clone(), torch.zeros(4, dtype=torch.int64), 3)
    torch.testing.assert_close(kept, logits.softmax(dim=1), rtol=1e-6, atol=1e-37, equal_nan=True)
    assert statistics.logsumexp.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(("experts", "num_experts", "num_rows"), [(3, 3, None), (5, 3, 60), (1, 1, None)])
def test_rows_are_gathered_and_combined(
    form: str, dtype: torch.dtype, experts: int, num_experts: int, num_rows: int | None
) -> None:
    chosen = torch.stack([torch.randperm(max(experts, 2))[:2] for _ in range(67)]) % experts
    if num_rows is not None:
        num_rows = int((chosen < num_experts).sum())
    index = align_rows(permutation_map(chosen, num_experts, num_rows), 4)
    x = _randn(67, 33, dtype=dtype)
    rows = gather(x, index)
    expected = torch.where((index.row_to_pair_R < 0).unsqueeze(1), 0, x[index.row_to_pair_R.clamp(min=0) // 2])
    assert torch.equal(rows, expected)
    rows = torch.where((index.row_to_pair_R < 0).unsqueeze(1), math.nan, rows)  # what is in empty rows stays out
    has_row = (index.pair_to_row_TK >= 0).sum(dim=1, keepdim=True)
    assert _error(combine(rows, index), x.double() * has_row) <= BOUNDS[dtype]


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_aligned_rows_hold_the_same_pairs(multiple: int) -> None:
    experts = torch.randint(6, (41, 2)).masked_fill_(torch.rand(41, 2) < 0.1, 9)  # 9 is elsewhere
    experts[experts == 2] = 3  # the third expert has none
    index = permutation_map(experts, 6, int((experts < 6).sum()))
    aligned = align_rows(index, multiple)
    assert (aligned.offsets_E % multiple == 0).all() and aligned.offsets_E.dtype == torch.int32
    assert aligned.offsets_E[-1] == aligned.row_to_pair_R.shape[0]
    assert torch.equal(aligned.row_to_pair_R[aligned.row_to_pair_R >= 0], index.row_to_pair_R)
    pairs = torch.arange(82).view(41, 2)
    has_row = aligned.pair_to_row_TK >= 0
    assert torch.equal(has_row, experts < 6)
    assert torch.equal(aligned.row_to_pair_R[aligned.pair_to_row_TK[has_row]], pairs[has_row])
    expert_of_row = torch.searchsorted(aligned.offsets_E, aligned.pair_to_row_TK[has_row], right=True)
    assert torch.equal(expert_of_row, experts[has_row])


def test_experts_in_16_bits_get_a_multiple_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PermutationMap] = []

    def spy(index: PermutationMap, multiple: int) -> PermutationMap:
        seen.append(align_rows(index, multiple))
        return seen[-1]

    monkeypatch.setattr("megatron.core.fusions.expert_mlp.align_rows", spy)
    monkeypatch.setattr(native, "FAST_NARROW_PRODUCTS", False)
    experts = torch.randint(4, (50, 1))
    x, gate_up, down = _randn(50, 32), 0.2 * _randn(4, 48, 32), 0.2 * _randn(4, 32, 24)
    index, probs = permutation_map(experts, 4), torch.rand(50, 1)
    narrow = expert_mlp(x.bfloat16(), probs, index, gate_up.bfloat16(), down.bfloat16())
    assert len(seen) == 1 and (seen[0].offsets_E % NARROW_ROWS == 0).all()
    wide = (x.bfloat16().double(), probs.double(), index, gate_up.bfloat16().double(), down.bfloat16().double())
    assert _error(narrow, expert_mlp(*wide)) <= 6e-3
    assert len(seen) == 1, "only 16-bit types that torch multiplies need it"


SIZES = [(1, 1, 1), (5, 3, 7), (6, 64, 64), (13, 65, 129), (63, 513, 65), (390, 17, 200), (700, 520, 70), (4, 0, 9)]
TRANSPOSED = pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
BETA = pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
needs_tiles = pytest.mark.skipif(not native.FAST_NARROW_PRODUCTS, reason="needs a processor with AMX")


def _check_product(
    rows: int, inner: int, columns: int, beta: float, transposed: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    """C = beta C + A B in the middle of wider matrices that hold what is no number."""

    def part(rows: int, columns: int) -> Tensor:
        whole = torch.full((rows + 2, columns + 3), math.nan, dtype=dtype)
        whole[1:-1, 1:-2] = _randn(rows, columns, dtype=dtype)
        return whole[1:-1, 1:-2]

    a = part(inner, rows).t() if "a" in transposed else part(rows, inner)
    b = part(columns, inner).t() if "b" in transposed else part(inner, columns)
    out = _randn(rows, columns + 5, dtype=out_dtype)
    expected = out.double()
    expected[:, :columns] = beta * expected[:, :columns] + a.double() @ b.double()
    if beta == 0:
        out[:, :columns] = math.nan  # does not count
    native.multiply([(a, b, out[:, :columns])], beta)
    assert _error(out[:, :columns], expected[:, :columns]) <= BOUNDS[out_dtype] / (1 if out_dtype == dtype else 4)
    assert torch.equal(out[:, columns:].double(), expected[:, columns:]), "beside the output"


@in_cpp
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@BETA
@TRANSPOSED
def test_products(form: str, rows: int, inner: int, columns: int, beta: float, transposed: str) -> None:
    _check_product(rows, inner, columns, beta, transposed, torch.float32, torch.float32)


NARROW_SIZES = [(1, 1, 1), (5, 3, 7), (32, 32, 32), (33, 65, 31), (16, 64, 48), (63, 513, 65), (390, 17, 200),
                (700, 1030, 540), (4, 0, 9)]  # fmt: skip


@needs_tiles
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "inner", "columns"), NARROW_SIZES)
@BETA
@TRANSPOSED
def test_products_of_bfloat16(
    rows: int, inner: int, columns: int, beta: float, transposed: str, out_dtype: torch.dtype
) -> None:
    _check_product(rows, inner, columns, beta, transposed, torch.bfloat16, out_dtype)


@needs_tiles
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("columns", [1024, 992, 1001])  # rows of the output that begin at a cache line, and that do not
def test_large_products_of_bfloat16_past_the_caches(columns: int, beta: float, out_dtype: torch.dtype) -> None:
    a, b = _randn(1100, 70, dtype=torch.bfloat16), _randn(70, columns, dtype=torch.bfloat16)
    out = _randn(1100, columns, dtype=out_dtype)
    expected = beta * out.double() + a.double() @ b.double()
    native.multiply([(a, b, out)], beta)
    assert _error(out, expected) <= (1e-6 if out_dtype == torch.float32 else 6e-3)


@needs_tiles
def test_operands_of_any_strides_and_no_others() -> None:
    wide, b, out = _randn(40, 100, dtype=torch.bfloat16), _randn(50, 8, dtype=torch.bfloat16), torch.empty(40, 8)
    spread, repeated = wide[:, ::2], torch.ones((), dtype=torch.bfloat16).expand(40, 50)
    row = _randn(8, 7, dtype=torch.bfloat16)[:, 2].unsqueeze(0)  # strides 56 and 7
    for a, other in ((spread, b), (repeated, b), (wide[:, :1], row), (wide[:, ::2], b.t().contiguous().t()[:, :8])):
        native.multiply([(a, other, out)], 0.0)
        assert _error(out, a.double() @ other.double()) <= 1e-6
    for a, other, place in ((wide, b, out), (spread, b, out[:39]), (spread, b, torch.empty(40, 9))):
        with pytest.raises(AssertionError):
            native.multiply([(a, other, place)], 0.0)
    sideways = torch.full((8, 40), math.nan).t()
    product.multiply(spread, b, sideways)
    assert _error(sideways, spread.double() @ b.double()) <= BOUNDS[torch.bfloat16]


@needs_tiles
def test_tile_registers_are_shared_with_torch() -> None:
    a, b = _randn(300, 200, dtype=torch.bfloat16), _randn(200, 300, dtype=torch.bfloat16)
    expected, out = a @ b, torch.empty(300, 300)  # oneDNN's, on the same registers
    for _ in range(3):
        native.multiply([(a, b, out)], 0.0)
        assert torch.equal(a @ b, expected) and _error(out, a.double() @ b.double()) <= 1e-6


@pytest.mark.parametrize("main_grad_dtype", [torch.float32, torch.bfloat16], ids=["main32", "main16"])
def test_products_of_all_experts(form: str, dtype: torch.dtype, main_grad_dtype: torch.dtype) -> None:
    if dtype == torch.float32 and main_grad_dtype == torch.bfloat16:
        pytest.skip("gradients are not narrower than the weights")
    counts = torch.tensor([0, 1, 7, 0, 127, 129, 400, 0])
    ends, rows = counts.cumsum(0).to(torch.int32), int(counts.sum())
    weight, x, grad = _randn(8, 70, 40, dtype=dtype), _randn(rows, 40, dtype=dtype), _randn(rows, 70, dtype=dtype)
    main_grad = _randn(8, 70, 40, dtype=main_grad_dtype)
    expected = main_grad.double()
    y, dx = grouped_product(x, weight, ends, transpose=True), grouped_product(grad, weight, ends, transpose=False)
    add_weight_gradient(grad, x, ends, main_grad, 1.0)
    add_weight_gradient(grad.double(), x.double(), ends, expected, 1.0)
    assert _error(main_grad, expected) <= BOUNDS[dtype]
    assert _error(y, grouped_product(x.double(), weight.double(), ends, transpose=True)) <= BOUNDS[dtype]
    assert _error(dx, grouped_product(grad.double(), weight.double(), ends, transpose=False)) <= BOUNDS[dtype]


@pytest.mark.parametrize(
    ("length", "groups", "width"), [(2, 1, 24), (5, 4, 24), (96, 2, 24), (97, 2, 24), (300, 1, 24), (600, 2, 64)]
)
def test_attention(form: str, dtype: torch.dtype, length: int, groups: int, width: int) -> None:
    query = _randn(2, 4, length, width, dtype=dtype)
    key = _randn(2, groups, length, width, dtype=dtype)
    value = _randn(length, 2, groups, width, dtype=dtype).permute(1, 2, 0, 3)
    # torch's own kernel for bfloat16 rounds the probabilities as well
    bound = 1.5e-2 if form == "PyTorch" and dtype == torch.bfloat16 else BOUNDS[dtype]
    _compare(causal_attention, query, key, value, bound=bound)


@pytest.mark.parametrize("narrow", [False, True])
def test_adamw_is_the_papers_formula(form: str, narrow: bool) -> None:
    master, grad = torch.randn(70001), torch.randn(70001)
    exp_avg, exp_avg_sq = torch.randn(70001), torch.rand(70001)
    weights = torch.zeros(70001, dtype=torch.bfloat16) if narrow else None
    step = AdamWStep(7, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.25)
    g, m, v = grad.double() * 0.25, exp_avg.double(), exp_avg_sq.double()
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    expected = master.double() * (1 - 1e-2 * 0.1)
    expected -= 1e-2 * (m / (1 - 0.9**7)) / ((v / (1 - 0.95**7)).sqrt() + 1e-8)
    adamw_(master, exp_avg, exp_avg_sq, grad, step, weights)
    assert _error(master, expected) <= 1e-7 and _error(exp_avg, m) <= 1e-7 and _error(exp_avg_sq, v) <= 1e-7
    if weights is not None:
        assert torch.equal(weights, master.bfloat16())


@in_cpp
def test_the_number_of_threads_changes_no_bit(form: str) -> None:
    x, weight, logits = _randn(500, 96), _randn(96), _randn(500, 333)
    ids, query, probs = torch.randint(333, (500,)), _randn(2, 4, 200, 16), torch.rand(500)

    def everything() -> list[Tensor]:
        y, inverse_rms = native.rms_norm(x, weight, 1e-5)
        out, logsumexp = native.attention(query, query, query)
        squares = torch.empty(96, 96)
        native.multiply([(x.t(), y, squares)], 0.0)
        narrow = torch.zeros(500, 500)
        if native.FAST_NARROW_PRODUCTS:
            native.multiply([(x.bfloat16(), y.bfloat16().t(), narrow)], 0.0)
        softmax = logits.clone()
        return [
            y, squares, narrow, out, softmax, *native.rms_norm_backward(x, y, weight, inverse_rms),
            *native.attention_backward(query, query, query, query, out, logsumexp),
            *native.softmax_statistics(softmax, ids, 333), *native.swiglu_backward(x, torch.cat((x, y), dim=1), probs),
        ]  # fmt: skip

    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_set_that_is_not_there_is_refused() -> None:
    if native.kernels_cpp is None:
        pytest.skip("not built")
    with pytest.raises(ValueError, match="sse9 is not to be had here"):
        native.kernels_cpp.choose_instruction_set("sse9")
