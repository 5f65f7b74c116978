"""Permutation, grouped product, routing and SwiGLU against plain loops, forward and backward."""

import pytest
import torch
from closeness import BOUNDS, relative_error

from megatron.core.fusions import forms, kernels
from megatron.core.fusions.expert_mlp import expert_mlp
from megatron.core.fusions.kernels.library import cpu as library
from megatron.core.fusions.linear import Backend, grouped_product, grouped_weight_gradient_
from megatron.core.fusions.permute import align_rows, combine_rows, gather_probs, gather_rows, permutation_map
from megatron.core.fusions.router import top_k_routing
from megatron.core.fusions.swiglu import swiglu, swiglu_backward
from megatron.training.grouped_gemm import seconds_of_products

# tokens, experts, top_k
CASES = [(0, 4, 2), (1, 4, 2), (7, 3, 1), (13, 4, 4), (129, 8, 2)]


def _experts(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, experts, generator=generator).topk(top_k).indices


@pytest.mark.parametrize(("tokens", "experts", "top_k"), CASES)
def test_permutation_is_a_stable_bijection(tokens: int, experts: int, top_k: int) -> None:
    chosen = _experts(tokens, experts, top_k)
    index = permutation_map(chosen, experts)
    pairs = index.row_to_pair_R
    assert sorted(pairs.tolist()) == list(range(tokens * top_k))
    assert torch.equal(index.pair_to_row_TK.reshape(-1)[pairs], torch.arange(tokens * top_k))
    expected = sorted(range(tokens * top_k), key=lambda pair: chosen.reshape(-1)[pair].item())
    assert pairs.tolist() == expected
    counts = [int((chosen == expert).sum()) for expert in range(experts)]
    assert index.offsets_E.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert index.offsets_E.dtype == torch.int32


@pytest.mark.parametrize(("tokens", "experts", "top_k"), CASES[1:])
def test_gather_and_combine_are_each_others_transpose(tokens: int, experts: int, top_k: int) -> None:
    index = permutation_map(_experts(tokens, experts, top_k), experts)
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(tokens * top_k, 5, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index), x)
    assert torch.autograd.gradcheck(lambda y: combine_rows(y, index), y)
    assert torch.autograd.gradcheck(lambda probs: gather_probs(probs, index), probs)
    rows = gather_rows(x, index)
    for row, pair in enumerate(index.row_to_pair_R.tolist()):
        assert torch.equal(rows[row], x[pair // top_k])
    assert torch.allclose(combine_rows(rows, index), top_k * x, rtol=1e-14)


COUNTS = [[3, 0, 5], [0, 0, 8], [8, 0, 0], [0, 1, 7], [127, 1, 129], [0, 0, 0]]
TYPES = [
    (torch.float64, 1e-14, "loop"),
    *(
        (dtype, BOUNDS[dtype], backend)
        for backend in ("loop", "grouped_mm")
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


def _drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.float64).to(dtype)


def _close(ours: torch.Tensor, reference: torch.Tensor, bound: float) -> None:
    assert relative_error(ours, reference) <= bound


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("dtype", "bound", "backend"), TYPES)
def test_grouped_products_equal_a_loop(counts: list[int], dtype: torch.dtype, bound: float, backend: Backend) -> None:
    x, weight, grad = _drawn(dtype, sum(counts), 16), _drawn(dtype, 3, 24, 16), _drawn(dtype, sum(counts), 24)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    for operand, transpose in ((x, True), (grad, False)):
        matrices = weight.double().transpose(1, 2) if transpose else weight.double()
        expected = torch.cat([p @ m for p, m in zip(operand.double().split(counts), matrices, strict=True)])
        _close(grouped_product(operand, weight, ends, transpose, backend), expected, bound)
    wide = torch.promote_types(dtype, torch.float32)
    for beta in (0.0, 1.0):
        out = _drawn(wide, 3, 24, 16)
        before = out.double().clone()
        if beta == 0:
            out.fill_(float("nan"))  # memory that was not cleared
        grouped_weight_gradient_(grad, x, ends, out, beta)
        for expert, (g, rows) in enumerate(zip(grad.double().split(counts), x.double().split(counts), strict=True)):
            if not counts[expert]:
                assert torch.equal(out[expert].double(), beta * before[expert])
            else:
                _close(out[expert], beta * before[expert] + g.T @ rows, bound)


@pytest.mark.parametrize("backend", ["auto", "loop", "grouped_mm"])
def test_what_is_asked_for_multiplies(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped_mm, calls = library.grouped_product, []

    def counted(*args: object) -> torch.Tensor:
        calls.append(args)
        return grouped_mm(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(library, "grouped_product", counted)
    weight, x, ends = _drawn(torch.float32, 2, 8, 16), _drawn(torch.float32, 5, 16), torch.tensor([2, 5]).int()
    grouped_product(x, weight, ends, True, backend)
    assert len(calls) == (backend == "grouped_mm")  # on a CPU only a flag asks for it
    grouped_product(x.double(), weight.double(), ends, True, backend)
    grouped_product(x[:, :15], weight[..., :15], ends, True, backend)
    assert len(calls) == (backend == "grouped_mm"), "it takes neither float64 nor rows that are not aligned"
    assert seconds_of_products(backend, _drawn(torch.float32, 2, 16, 8), _drawn(torch.float32, 2, 8, 8), 3)


def _loop(x: torch.Tensor, probs: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor):
    """The formula, token by token."""
    rows = []
    for token in range(x.shape[0]):
        total = x[token] * 0
        for prob, expert in zip(probs[token], experts[token].tolist(), strict=True):
            if 0 <= expert < gate_up.shape[0]:
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                total = total + prob * (down[expert] @ (gate * gate.sigmoid() * up))
        rows.append(total)
    return torch.stack(rows) if rows else x.clone()


@pytest.mark.parametrize("first_expert", [0, 1], ids=["all experts here", "some elsewhere"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), CASES)
@pytest.mark.parametrize(("dtype", "bound", "backend"), TYPES)
def test_the_experts_equal_a_loop_over_tokens(
    tokens: int, experts: int, top_k: int, dtype: torch.dtype, bound: float, backend: Backend, first_expert: int
) -> None:
    chosen = _experts(tokens, experts, top_k) - first_expert
    here, width = experts - 2 * first_expert, 24
    num_rows = int(((chosen >= 0) & (chosen < here)).sum()) if first_expert else None
    index = permutation_map(chosen, here, num_rows)
    inputs = [_drawn(dtype, tokens, 16), _drawn(dtype, tokens, top_k), _drawn(dtype, here, 2 * width, 16)]
    inputs.append(_drawn(dtype, here, 16, width) * 0.2)
    inputs[1] = inputs[1].to(torch.promote_types(dtype, torch.float32)).sigmoid()
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.double().requires_grad_() for tensor in inputs]
    y = expert_mlp(ours[0], ours[1], index, ours[2], ours[3], backend)
    expected = _loop(theirs[0], theirs[1], chosen, theirs[2], theirs[3])
    _close(y, expected.detach(), bound)
    grad = _drawn(dtype, tokens, 16).flip(0)
    y.backward(grad)
    expected.backward(grad.double())
    for a, b in zip(ours, theirs, strict=True):
        if b.grad is not None:
            assert a.grad is not None
            _close(a.grad, b.grad, 2 * bound)


def test_for_the_backward_pass_only_inputs_and_inner_products_are_kept() -> None:
    tokens, experts, top_k, hidden, width = 12, 4, 2, 16, 24
    index = permutation_map(_experts(tokens, experts, top_k), experts)
    x, probs = _drawn(torch.float32, tokens, hidden), _drawn(torch.float32, tokens, top_k)
    weights = [_drawn(torch.float32, experts, 2 * width, hidden), _drawn(torch.float32, experts, hidden, width)]
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_mlp(x.requires_grad_(), probs.requires_grad_(), index, *(w.requires_grad_() for w in weights))
    rows = tokens * top_k
    floats = tokens * hidden + rows * 2 * width + rows  # x, h, p
    assert sum(tensor.numel() for tensor in kept if tensor.is_floating_point()) == floats
    # the permutation, and the ends of rows for products and for weight gradients
    assert sum(tensor.numel() for tensor in kept if not tensor.is_floating_point()) == 2 * rows + 2 * experts


def test_weight_gradients_go_straight_to_the_sink() -> None:
    index = permutation_map(torch.tensor([[0, 1], [0, 1]]), 3)  # the third expert gets nothing
    x, probs = _drawn(torch.float32, 2, 16), torch.full((2, 2), 0.5)
    weights = [_drawn(torch.float32, 3, 8, 16).requires_grad_(), _drawn(torch.float32, 3, 16, 4).requires_grad_()]
    expert_mlp(x, probs, index, *weights).sum().backward()
    gradients = [weight.grad for weight in weights]
    for beta in (0.0, 1.0):
        sinks = [torch.full_like(weight, float("nan") if beta == 0 else 2.0) for weight in weights]
        for weight, main_grad in zip(weights, sinks, strict=True):
            weight.grad = None
            weight.gradient_sink = lambda write, out=main_grad, beta=beta: write(out, beta)
        expert_mlp(x, probs, index, *weights).sum().backward()
        for weight, main_grad, gradient in zip(weights, sinks, gradients, strict=True):
            assert weight.grad is None and gradient is not None
            torch.testing.assert_close(main_grad, gradient + 2.0 * beta)


def test_routing_renormalises_and_counts() -> None:
    logits = torch.randn(50, 8, dtype=torch.float64)
    routing = top_k_routing(logits, 2)
    values, experts = logits.topk(2)
    assert torch.equal(routing.experts_TK, experts)
    torch.testing.assert_close(routing.probs_TK, values.softmax(-1), rtol=1e-14, atol=0)
    assert routing.tokens_per_expert_E.tolist() == torch.bincount(experts.reshape(-1), minlength=8).tolist()
    torch.testing.assert_close(routing.logsumexp_T, logits.exp().sum(-1).log(), rtol=1e-12, atol=1e-12)


def test_swiglu_multiplies_the_probability_in() -> None:
    gate_up = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 4, dtype=torch.float64)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = gate * gate.sigmoid() * up * probs[:, None]
    expected.backward(grad)
    torch.testing.assert_close(swiglu(gate_up.detach(), probs.detach()), expected, rtol=1e-14, atol=0)
    ours = swiglu_backward(grad, gate_up.detach(), probs.detach())
    for a, b in zip(ours, (gate_up.grad, probs.grad, expected.detach()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_aligned_rows_hold_the_same_pairs(multiple: int) -> None:
    torch.manual_seed(0)
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
    seen: list[torch.Tensor] = []
    find = forms.kernel

    def spy(operation: str, *arguments: object) -> object:
        if operation == "grouped_product" and arguments[0].dtype == torch.bfloat16:  # type: ignore[attr-defined]
            seen.append(arguments[2])  # type: ignore[arg-type]
        return find(operation, *arguments)

    monkeypatch.setattr(forms, "kernel", spy)
    monkeypatch.delitem(kernels.DEVICES, "cpu")  # torch multiplies
    experts = torch.randint(4, (50, 1))
    x, gate_up, down = torch.randn(50, 32), 0.2 * torch.randn(4, 48, 32), 0.2 * torch.randn(4, 32, 24)
    index, probs = permutation_map(experts, 4), torch.rand(50, 1)
    narrow = expert_mlp(x.bfloat16(), probs, index, gate_up.bfloat16(), down.bfloat16())
    # asked for the layer, and for each product
    assert len(seen) == 3 and all((ends % 32 == 0).all() for ends in seen)
    wide = (x.bfloat16().double(), probs.double(), index, gate_up.bfloat16().double(), down.bfloat16().double())
    _close(narrow, expert_mlp(*wide), BOUNDS[torch.bfloat16])
    assert forms.kernel("row_multiple", x, gate_up, "auto") is None, "only 16-bit types need it"
