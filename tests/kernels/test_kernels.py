"""Every Triton kernel against its formula in float64."""

import pytest
import torch
from kernel_testing import DTYPES, assert_close, drawn
from torch import Tensor

from megatron.core.fusions.kernels import cross_entropy, grouped_gemm, permute, rms_norm, rotary, router, swiglu

WIDTHS = [(1, 8), (7, 33), (129, 64)]


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), WIDTHS)
def test_rms_norm(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = drawn((rows, width), dtype, device), drawn((width,), dtype, device, 1)
    grad = drawn((rows, width), dtype, device, 2)
    wide_x, wide_weight = _wide(x, weight)
    expected = wide_weight * wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + 1e-5)
    expected.backward(grad.double())
    y, inverse_rms = rms_norm.forward(x, weight, 1e-5)
    assert_close(y, expected)
    grad_x, grad_weight = rms_norm.backward(grad, x, weight, inverse_rms)
    assert_close(grad_x, wide_x.grad)
    assert_close(grad_weight, wide_weight.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 8), (7, 33), (13, 600)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up, probs = drawn((rows, 2 * width), dtype, device), drawn((rows,), torch.float32, device, 1).sigmoid()
    grad = drawn((rows, width), dtype, device, 2)
    wide_gate_up, wide_probs = _wide(gate_up, probs)
    gate, up = wide_gate_up.chunk(2, dim=-1)
    expected = gate * gate.sigmoid() * up * wide_probs[:, None]
    expected.backward(grad.double())
    assert_close(swiglu.forward(gate_up, probs), expected)
    grad_gate_up, grad_probs, y = swiglu.backward(grad, gate_up, probs)
    assert torch.equal(y, swiglu.forward(gate_up, probs))
    assert_close(grad_gate_up, wide_gate_up.grad)
    assert_close(grad_probs, wide_probs.grad)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (1, 8, 2), (67, 5, 1), (131, 8, 2), (64, 4, 4)])
def test_router(tokens: int, experts: int, top_k: int, device: torch.device) -> None:
    logits = drawn((tokens, experts), torch.float32, device)
    (wide,) = _wide(logits)
    softmax = wide.softmax(-1)
    values, chosen = softmax.topk(top_k)
    probs, logsumexp = values / values.sum(-1, keepdim=True), wide.logsumexp(-1)
    grads = [drawn(tuple(out.shape), torch.float32, device, 3 + i) for i, out in enumerate((probs, softmax, logsumexp))]
    torch.autograd.backward((probs, softmax, logsumexp), [grad.double() for grad in grads])
    out = router.forward(logits, top_k)
    assert torch.equal(out.experts_TK, chosen)
    for ours, reference in ((out.probs_TK, probs), (out.softmax_TE, softmax), (out.logsumexp_T, logsumexp)):
        assert_close(ours, reference)
    assert out.tokens_per_expert_E.tolist() == torch.bincount(chosen.flatten(), minlength=experts).tolist()
    assert_close(router.backward(*grads, out.probs_TK, out.experts_TK, out.softmax_TE), wide.grad)


def test_of_equal_experts_the_first_is_taken(device: torch.device) -> None:
    logits = torch.zeros((3, 5), device=device)
    assert router.forward(logits, 2).experts_TK.tolist() == [[0, 1]] * 3


def test_a_token_that_is_not_a_number_gets_experts_that_exist(device: torch.device) -> None:
    # only compiled kernels can fail here: the interpreter's argmax is NumPy's, which finds a NaN
    logits = torch.zeros((2, 5), device=device)
    logits[0] = float("nan")
    out = router.forward(logits, 5)
    assert out.experts_TK.sort().values.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert out.probs_TK[0].isnan().all() and not out.probs_TK[1].isnan().any()


@pytest.mark.parametrize("forced", [None, 0, 4])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (1, 5, 2), (127, 5, 1), (193, 8, 2), (65, 7, 7)])
def test_permutation(tokens: int, experts: int, top_k: int, forced: int | None, device: torch.device) -> None:
    scores = drawn((tokens, experts), torch.float32, device)
    if forced is not None and forced < experts:
        scores[:, forced] += 100  # all tokens to one expert
    chosen = scores.topk(top_k).indices
    row_to_pair, pair_to_row, ends = permute.permutation_map(chosen, experts)
    assert row_to_pair.tolist() == torch.argsort(chosen.flatten(), stable=True).tolist()
    assert pair_to_row.flatten()[row_to_pair].tolist() == list(range(tokens * top_k))
    assert ends.tolist() == torch.bincount(chosen.flatten(), minlength=experts).cumsum(0).tolist()
    assert ends.dtype == torch.int32


def test_pairs_of_other_ranks_experts_get_no_row(device: torch.device) -> None:
    chosen = drawn((77, 6), torch.float32, device).topk(2).indices - 2  # experts -2 ... 3, of which 0 ... 2 are here
    here = (chosen >= 0) & (chosen < 3)
    row_to_pair, pair_to_row, ends = permute.permutation_map(chosen, 3, int(here.sum()))
    flat = torch.where(here, chosen, 3).flatten()
    assert row_to_pair.tolist() == torch.argsort(flat, stable=True)[: int(here.sum())].tolist()
    assert torch.equal(pair_to_row >= 0, here)
    assert pair_to_row[here].sort().values.tolist() == list(range(int(here.sum())))
    assert ends.tolist() == torch.bincount(flat, minlength=4)[:3].cumsum(0).tolist()
    y = drawn((int(here.sum()), 8), torch.float32, device)
    expected = (y.double()[pair_to_row.clamp(min=0)] * here[..., None]).sum(1)
    assert_close(permute.combine(y, pair_to_row), expected)
    padded = torch.cat((row_to_pair, row_to_pair.new_full((2,), -1)))
    x = drawn((77, 8), torch.float32, device)
    assert torch.equal(permute.gather(x, padded, 2)[:-2], x[row_to_pair // 2])
    assert not permute.gather(x, padded, 2)[-2:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "top_k"), [(0, 8, 2), (1, 33, 1), (13, 1030, 2)])
def test_gather_and_combine(tokens: int, width: int, top_k: int, dtype: torch.dtype, device: torch.device) -> None:
    chosen = drawn((tokens, 4), torch.float32, device).topk(top_k).indices
    row_to_pair, pair_to_row, _ = permute.permutation_map(chosen, 4)
    x = drawn((tokens, width), dtype, device)
    rows = permute.gather(x, row_to_pair, top_k)
    assert torch.equal(rows, x[row_to_pair // top_k])
    y = drawn((tokens * top_k, width), dtype, device, 1)
    assert_close(permute.combine(y, pair_to_row), y.double()[pair_to_row].sum(dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(0, 0, 0), (3, 0, 70), (0, 1, 64), (65, 7, 0), (127, 1, 129)], ids=str)
def test_weight_gradient(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    rows, out_width, in_width = sum(counts), 130, 34
    # rows after the last expert's end belong to nobody and must stay out
    grad, x = drawn((rows + 2, out_width), dtype, device), drawn((rows + 2, in_width), dtype, device, 1)
    grad[rows:], x[rows:] = float("nan"), float("nan")
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    before = drawn((len(counts), out_width, in_width), torch.float32, device, 2)
    main_grad = before.clone()
    grouped_gemm.accumulate_weight_gradient(grad, x, ends, main_grad)
    start = 0
    for expert, count in enumerate(counts):
        part = slice(start, start + count)
        start += count
        if not count:
            assert torch.equal(main_grad[expert], before[expert])
            continue
        assert_close(main_grad[expert], before[expert].double() + grad[part].double().T @ x[part].double())


# 80,000 rows of the two inner products of Mixtral 8x7B are more than 2^31 numbers
MANY_ROWS, WIDE = 80_000, 28_672


def test_rows_beyond_32_bits_are_moved(device: torch.device) -> None:
    # on a CPU only pages that are touched take memory, on a GPU it is 4.6 GB
    y = torch.empty((MANY_ROWS, WIDE), dtype=torch.float16, device=device)
    y[-2], y[-1] = 1, torch.arange(WIDE, device=device) % 100
    pairs = torch.tensor([2 * MANY_ROWS - 1, -1], device=device)
    assert torch.equal(permute.gather(y, pairs, 2), torch.stack((y[-1], torch.zeros_like(y[-1]))))
    rows = torch.tensor([[MANY_ROWS - 1, MANY_ROWS - 2]], device=device)
    assert torch.equal(permute.combine(y, rows), y[-1:] + 1)


@pytest.mark.gpu
def test_rows_beyond_32_bits_are_computed(device: torch.device) -> None:
    last = slice(MANY_ROWS - 64, MANY_ROWS)
    gate_up = torch.empty((MANY_ROWS, WIDE), dtype=torch.bfloat16, device=device).normal_()
    probs, grad = torch.rand(MANY_ROWS, device=device), torch.empty_like(gate_up[:, ::2]).normal_()
    y, (grad_gate_up, grad_probs, again) = swiglu.forward(gate_up, probs), swiglu.backward(grad, gate_up, probs)
    small = swiglu.backward(grad[last].clone(), gate_up[last].clone(), probs[last].clone())
    for ours, expected in zip((grad_gate_up[last], grad_probs[last], again[last]), small, strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(y[last], small[2])
    ends = torch.tensor((MANY_ROWS - 64, MANY_ROWS), dtype=torch.int32, device=device)
    main_grad, x = torch.zeros((2, WIDE, 64), device=device), drawn((MANY_ROWS, 64), torch.bfloat16, device)
    grouped_gemm.accumulate_weight_gradient(gate_up, x, ends, main_grad)
    assert_close(main_grad[1], gate_up[last].double().T @ x[last].double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "columns"), [(0, 8, 8), (3, 5, 5), (7, 4100, 4097), (2, 16, 0)])
def test_cross_entropy(rows: int, width: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = drawn((rows, width), dtype, device)
    ids = torch.arange(rows, device=device) * 5 - 2  # the first one is another rank's
    elsewhere = (ids < 0) | (ids >= columns)
    real = logits.double()[:, :columns]
    target = (
        torch.where(elsewhere, 0.0, real.gather(1, ids.clamp(0, max(columns - 1, 0))[:, None])[:, 0])
        if columns
        else torch.zeros(rows, device=device)
    )
    largest, total, target_logit = cross_entropy.statistics(logits, ids, columns)
    assert_close(target_logit, target)
    if not columns:
        assert largest.tolist() == [float("-inf")] * rows
        assert not total.any()
        return
    assert_close(largest + total.log(), real.logsumexp(1))
    grad = drawn((rows,), torch.float32, device, 1)
    one_hot = (torch.arange(width, device=device) == ids[:, None]) & ~elsewhere[:, None]
    expected = torch.zeros((rows, width), dtype=torch.float64, device=device)
    expected[:, :columns] = real.softmax(1)
    expected = (expected - one_hot.double()) * grad.double()[:, None]
    cross_entropy.gradient_(logits, ids, largest + total.log(), grad, columns)
    assert_close(logits, expected)


def test_the_gradient_of_a_sum_of_losses_is_one_number(device: torch.device) -> None:
    ids, logsumexp = torch.arange(3, device=device), torch.zeros(3, device=device)
    ours, expected = (drawn((3, 5), torch.float32, device) for _ in range(2))
    grad = torch.tensor((2.0, 7.0), device=device)[:1].expand(3)
    cross_entropy.gradient_(ours, ids, logsumexp, grad, 5)
    cross_entropy.gradient_(expected, ids, logsumexp, grad.clone(), 5)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize(("batch", "heads", "length", "width"), [(1, 1, 1, 2), (2, 3, 5, 12), (2, 9, 7, 16)])
def test_rotary(
    batch: int, heads: int, length: int, width: int, own_positions: bool, dtype: torch.dtype, device: torch.device
) -> None:
    # queries are read out of a wider tensor, with the sequence first
    x = drawn((length, batch, heads, 2 * width), dtype, device)[..., width:].permute(1, 2, 0, 3)
    angles = drawn((batch, length, width // 2) if own_positions else (length, width // 2), torch.float32, device, 1)
    cos, sin = angles.cos(), angles.sin()
    wide_cos, wide_sin = ((t[:, None] if own_positions else t).double() for t in (cos, sin))
    first, second = x.double().chunk(2, dim=-1)
    expected = torch.cat((first * wide_cos - second * wide_sin, second * wide_cos + first * wide_sin), dim=-1)
    y = rotary.rotate(x, cos, sin)
    assert y.is_contiguous()
    assert_close(y, expected)
    assert_close(rotary.rotate(y, cos, sin, inverse=True), x)
