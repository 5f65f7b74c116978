"""Every form where it is easily wrong: NaN, infinities, ties, memory that was used before, repeated runs."""

import math
from collections.abc import Callable

import pytest
import torch
from conformance_testing import INSTRUCTION_SETS, assert_close, drawn, each, has_descriptors, only
from conformance_testing import device_of as _device

from megatron.core.fusions.attention import causal_attention
from megatron.core.fusions.cross_entropy import softmax_gradient_, softmax_statistics
from megatron.core.fusions.expert_mlp import expert_mlp
from megatron.core.fusions.linear import (
    grouped_weight_gradient_,
    grouped_weight_gradient_persistent_,
    linear,
    takes_persistent,
)
from megatron.core.fusions.permute import combine_pairs, gather_pairs, permutation_map
from megatron.core.fusions.rms_norm import rms_norm
from megatron.core.fusions.rotary import apply_rotary, rotary_tables
from megatron.core.fusions.router import top_k_routing
from megatron.core.fusions.swiglu import swiglu, swiglu_backward

each_form = pytest.mark.parametrize("form", each())


@each_form
def test_swiglu_of_large_numbers_and_nan(form: str) -> None:
    gate = torch.tensor([0.0, 30.0, -30.0, 90.0, -90.0, 1e4, -1e4, 1e30, math.nan])
    gate_up = torch.stack((gate, torch.ones_like(gate)), dim=1).to(_device(form))
    with only(form):
        y = swiglu(gate_up, torch.ones(9, device=gate_up.device)).squeeze(1).cpu()
    torch.testing.assert_close(y, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-35, equal_nan=True)


@each_form
def test_softmax_of_logits_far_apart_and_of_nan(form: str) -> None:
    logits = torch.tensor([[0.0, -1e30, -90.0], [1e30, 0.0, -1e30], [0.0, math.nan, 1.0], [-100.0, -300.0, -100.0]])
    ours, ids, device = logits.clone().to(_device(form)), torch.ones(4, dtype=torch.int64), _device(form)
    with only(form):
        statistics = softmax_statistics(ours, ids.to(device), 3)
        logsumexp = statistics.logsumexp
        softmax_gradient_(ours, logsumexp, ids.to(device), logsumexp, torch.ones(4, device=device), 3)
    expected = logits.softmax(dim=1) - torch.nn.functional.one_hot(ids, 3)
    assert logsumexp.isnan().tolist() == [False, False, True, False]
    # the logarithm of a sum at -100 is rounded to 4e-6
    torch.testing.assert_close(ours.cpu(), expected, rtol=4e-6, atol=1e-7, equal_nan=True)


@each_form
def test_the_gradient_of_a_sum_of_losses_is_one_number(form: str) -> None:
    ids = torch.arange(3, device=_device(form))
    grad = torch.tensor((2.0, 7.0), device=ids.device)[:1].expand(3)
    results = []
    with only(form):
        for upstream in (grad, grad.clone()):
            logits = drawn(3, 5, device=_device(form))
            logsumexp = softmax_statistics(logits, ids, 5).logsumexp
            softmax_gradient_(logits, logsumexp, ids, logsumexp, upstream.contiguous(), 5)
            results.append(logits)
    assert torch.equal(*results)


in_triton = pytest.mark.parametrize("form", each("triton"))


@in_triton
def test_of_equal_experts_the_first_is_taken(form: str) -> None:
    with only(form):
        assert top_k_routing(torch.zeros((3, 5), device=_device(form)), 2).experts_TK.tolist() == [[0, 1]] * 3


@in_triton
def test_activations_that_are_computed_again_have_the_same_bits(form: str) -> None:
    gate_up, probs = drawn(13, 1200, device=_device(form)), drawn(13, device=_device(form), seed=1).sigmoid()
    with only(form):
        assert torch.equal(swiglu(gate_up, probs), swiglu_backward(gate_up[:, :600].clone(), gate_up, probs)[2])


@each_form
def test_a_token_of_nan_gets_experts_that_exist(form: str) -> None:
    # of Triton only compiled kernels can fail here: the interpreter's argmax is NumPy's, which finds a NaN
    logits = torch.zeros((2, 5), device=_device(form))
    logits[0] = math.nan
    with only(form):
        out = top_k_routing(logits, 5)
    assert out.experts_TK.sort().values.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert out.probs_TK[0].isnan().all() and not out.probs_TK[1].isnan().any()


@each_form
def test_rows_behind_the_last_expert_stay_out(form: str) -> None:
    counts, device = (65, 7, 0), _device(form)
    grad, x = drawn(74, 48, device=device), drawn(74, 32, device=device, seed=1)
    grad[72:], x[72:] = math.nan, math.nan
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    before = drawn(3, 48, 32, device=device, seed=2)
    out = before.clone()
    with only(form):
        grouped_weight_gradient_(grad, x, ends, out, 1.0)
    assert torch.equal(out[2], before[2])
    for expert, rows in ((0, slice(65)), (1, slice(65, 72))):
        assert_close(out[expert], before[expert].double() + grad[rows].double().T @ x[rows].double())


@in_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("add_", [grouped_weight_gradient_, grouped_weight_gradient_persistent_])
def test_nan_of_an_expert_stays_with_it(form: str, add_: Callable[..., None], beta: float) -> None:
    if not has_descriptors():
        pytest.skip("needs an H100 or B200")
    # experts begin at odd rows, one has a single row and one none; there are four tiles, three of them in part
    counts, out_width, in_width, margin, device = (5, 1, 0, 66, 3), 136, 264, 64, _device(form)
    of_rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    grad = drawn(sum(counts) + 2, out_width, dtype=torch.float16, device=device)
    x = drawn(sum(counts) + 2, in_width, dtype=torch.float16, device=device, seed=1)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    for expert in (0, 3):
        grad[: len(of_rows)][of_rows == expert], x[: len(of_rows)][of_rows == expert] = math.nan, math.inf
    grad[len(of_rows) :], x[len(of_rows) :] = math.inf, math.nan
    # between the main gradients of other layers
    whole = torch.full((2 * margin + len(counts) * out_width * in_width,), 7.0, device=device)
    out = whole[margin:-margin].view(len(counts), out_width, in_width)
    out.copy_(drawn(*out.shape, seed=2) if beta else torch.tensor(math.nan))
    before = out.clone()
    with only(form) as used:
        add_(grad, x, ends, out, beta)
    assert used == {add_.__name__}
    assert (whole[:margin] == 7).all() and (whole[-margin:] == 7).all()
    assert out[0].isnan().all() and out[3].isnan().all()
    assert torch.equal(out[2], beta * before[2] if beta else torch.zeros_like(out[2]))
    for expert in (1, 4):
        mine = slice(int(ends[expert - 1]), int(ends[expert]))
        expected = grad[mine].double().T @ x[mine].double()
        assert_close(out[expert], expected + before[expert].double() if beta else expected)


@in_triton
def test_what_descriptors_do_not_take_goes_another_way(form: str) -> None:
    if not has_descriptors():
        pytest.skip("needs an H100 or B200")
    ends = torch.tensor((3, 7), dtype=torch.int32, device=_device(form))

    def operands(out_width: int, in_width: int, rows: int = 7, moved: int = 0) -> list[torch.Tensor]:
        shapes = ((rows, out_width), (rows, in_width), (2, out_width, in_width))
        flat = [
            drawn(math.prod(shape) + moved, dtype=dtype, device=ends.device, seed=number)
            for number, (shape, dtype) in enumerate(zip(shapes, (torch.float16, torch.float16, torch.float32)))
        ]
        return [tensor[moved:].view(shape) for tensor, shape in zip(flat, shapes)]

    taken = operands(16, 24)
    cases = {
        "taken": (*taken, 1.0),
        "a half": (*taken, 0.5),
        "no rows": (*operands(16, 24, rows=0), 1.0),
        "width of 12": (*operands(12, 24), 1.0),
        "begins at 4 bytes": (*operands(16, 24, moved=1), 1.0),
        "narrow gradients": (*taken[:2], taken[2].half(), 1.0),
        "wide operands": (*(tensor.float() for tensor in taken), 1.0),
    }
    for name, (grad, x, out, beta) in cases.items():
        expected, mine = out.double() * beta, torch.minimum(ends, torch.tensor(len(x), device=ends.device))
        for expert, rows in enumerate((slice(0, 3), slice(3, 7))):
            expected[expert] += grad[rows].double().T @ x[rows].double()
        with only(form) as used:
            grouped_weight_gradient_persistent_(grad, x, mine.to(torch.int32), out, beta)
        assert ("grouped_weight_gradient_persistent_" in used) == (name == "taken"), name
        assert_close(out, expected, 1e-3 if out.dtype == torch.float16 else None)
    with only(form):
        weight = torch.empty(2, 16, 24, dtype=torch.float16, device=ends.device)
        assert takes_persistent(weight, weight.float()) and not takes_persistent(weight, weight)
    with only("formula"):
        assert not takes_persistent(weight, weight.float())


@each_form
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_layer_without_tokens_has_a_gradient_of_nothing(form: str, beta: float) -> None:
    weight = drawn(5, 3, device=_device(form)).requires_grad_()
    main_grad = torch.full((5, 3), 4.0 if beta else math.nan, device=_device(form))
    weight.gradient_sink = lambda write: write(main_grad, beta)  # type: ignore[attr-defined]
    with only(form):
        linear(torch.empty(0, 3, device=_device(form)), weight).sum().backward()
    assert torch.equal(main_grad.cpu(), torch.full((5, 3), 4.0 * beta))


@each_form
def test_experts_repeat_themselves_and_leave_no_dirt(form: str) -> None:
    device, tokens, experts = _device(form), 13, 5
    x, probs = drawn(tokens, 24, device=device), drawn(tokens, 2, device=device, seed=1).sigmoid()
    scores = drawn(tokens, experts, device=device, seed=2)
    scores[:, 1] -= 100  # chosen by no token

    def run() -> list[torch.Tensor]:
        index = permutation_map(scores.topk(2).indices, experts)
        weights = [drawn(*shape, device=device, seed=3).requires_grad_() for shape in ((5, 16, 24), (5, 24, 8))]
        main_grads = [torch.full_like(weight, math.nan) for weight in weights]
        for weight, main_grad in zip(weights, main_grads, strict=True):
            weight.gradient_sink = lambda write, out=main_grad: write(out, 0.0)  # type: ignore[attr-defined]
        leaves = [tensor.clone().requires_grad_() for tensor in (x, probs)]
        y = expert_mlp(*leaves, index, *weights)
        y.sum().backward()
        return [y, *main_grads, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    with only(form):
        first, second = run(), run()
    assert len(first) == 5
    for a, b in zip(first, second, strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)
    assert not first[1][1].any() and not first[2][1].any()


# 80,000 rows of the two inner products of Mixtral 8x7B are more than 2^31 numbers
MANY_ROWS, WIDE = 80_000, 28_672


@pytest.mark.parametrize("form", each("triton", *INSTRUCTION_SETS))
def test_rows_beyond_32_bits_are_moved(form: str) -> None:
    # on a CPU only pages that are touched take memory, on a GPU it is 4.6 GB
    dtype = torch.float16 if form == "triton" else torch.bfloat16
    y = torch.empty((MANY_ROWS, WIDE), dtype=dtype, device=_device(form))
    y[-2], y[-1] = 1, torch.arange(WIDE, device=y.device) % 100
    pairs = torch.tensor([2 * MANY_ROWS - 1, -1], device=y.device)
    rows = torch.tensor([[MANY_ROWS - 1, MANY_ROWS - 2]], device=y.device)
    with only(form) as used:
        assert torch.equal(gather_pairs(y, pairs, 2), torch.stack((y[-1], torch.zeros_like(y[-1]))))
        assert torch.equal(combine_pairs(y, rows), y[-1:] + 1)
    assert used == {"gather_pairs", "combine_pairs"}


@pytest.mark.gpu
def test_rows_beyond_32_bits_are_computed() -> None:
    last = slice(MANY_ROWS - 64, MANY_ROWS)
    gate_up = torch.empty((MANY_ROWS, WIDE), dtype=torch.bfloat16, device="cuda").normal_()
    probs, grad = torch.rand(MANY_ROWS, device="cuda"), torch.empty_like(gate_up[:, ::2]).normal_()
    with only("triton"):
        y, (grad_gate_up, grad_probs, again) = swiglu(gate_up, probs), swiglu_backward(grad, gate_up, probs)
        small = swiglu_backward(grad[last].clone(), gate_up[last].clone(), probs[last].clone())
        for ours, expected in zip((grad_gate_up[last], grad_probs[last], again[last]), small, strict=True):
            assert torch.equal(ours, expected)
        assert torch.equal(y[last], small[2])
        ends = torch.tensor((MANY_ROWS - 64, MANY_ROWS), dtype=torch.int32, device="cuda")
        main_grad = torch.zeros((2, WIDE, 64), device="cuda")
        x = drawn(MANY_ROWS, 64, dtype=torch.bfloat16, device="cuda")
        grouped_weight_gradient_(gate_up, x, ends, main_grad, 1.0)
    assert_close(main_grad[1], gate_up[last].double().T @ x[last].double())


@each_form
def test_frozen_weights_get_no_gradient(form: str) -> None:
    device = _device(form)
    x, probs = drawn(6, 16, device=device).requires_grad_(), drawn(6, 2, device=device, seed=1).sigmoid()
    norm, gate_up, down = drawn(16, device=device), drawn(3, 16, 16, device=device), drawn(3, 16, 8, device=device)
    for weight in (norm, gate_up, down):
        weight.gradient_sink = lambda write: pytest.fail("a frozen weight got a gradient")  # type: ignore[attr-defined]
    index = permutation_map(drawn(6, 3, device=device, seed=2).topk(2).indices, 3)
    with only(form):
        expert_mlp(rms_norm(x, norm, 1e-5), probs, index, gate_up, down).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@each_form
def test_a_norm_of_wider_weights_keeps_the_type_of_its_input(form: str) -> None:
    x, weight = drawn(3, 8, dtype=torch.float16, device=_device(form)), drawn(8, device=_device(form), seed=1)
    with only(form):
        y = rms_norm(x.requires_grad_(), weight, 1e-5)
        y.sum().backward()
    assert y.dtype == torch.float16 and x.grad is not None and x.grad.dtype == torch.float16


@each_form
def test_attention_takes_any_strides(form: str) -> None:
    parts = [drawn(2, 4, 16, 8, device=_device(form), seed=i).transpose(2, 3).contiguous() for i in range(3)]
    query, key, value = (part.transpose(2, 3).requires_grad_() for part in parts)
    with only(form):
        out = causal_attention(query, key, value)
        (ours,) = torch.autograd.grad(out.sum(), query)
    wide = [part.detach().double().requires_grad_() for part in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    assert_close(out, expected)
    assert_close(ours, torch.autograd.grad(expected.sum(), wide[0])[0], 1e-5)


@in_triton
def test_attention_to_rotated_queries_lies_as_the_next_product_takes_it(form: str) -> None:
    # as split off the product's output [S, B, heads, ...]
    whole = drawn(6, 2, 3, 16, device=_device(form)).requires_grad_()
    query = whole[..., 8:].permute(1, 2, 0, 3)
    cos, sin = rotary_tables(torch.arange(6, device=whole.device), 8, 1e4, torch.float32)
    with only(form):
        rotated = apply_rotary(query, cos, sin)
        context = torch.empty_like(rotated)  # FlashAttention's output
        assert context.permute(2, 0, 1, 3).is_contiguous()
        # its gradient lies like that too, and goes back as it is
        grad = drawn(6, 2, 3, 8, device=_device(form), seed=1).permute(1, 2, 0, 3)
        grads = (grad, grad.contiguous(), grad.transpose(2, 3).contiguous().transpose(2, 3))
        results = [torch.autograd.grad(rotated, whole, each, retain_graph=True)[0] for each in grads]
    assert results[0].any() and all(torch.equal(result, results[0]) for result in results)
