"""Permutation, grouped product, routing and SwiGLU against plain loops, forward and backward."""

import pytest
import torch

from megatron.core.fusions.grouped_gemm import grouped_gemm
from megatron.core.fusions.permute import combine_rows, gather_probs, gather_rows, permutation_map
from megatron.core.fusions.router import top_k_routing
from megatron.core.fusions.swiglu import weighted_swiglu

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


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 8], [8, 0, 0], [0, 1, 7], [0, 0, 0]], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_grouped_gemm_equals_a_loop(counts: list[int], dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(3, 24, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    wide_x, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    y = grouped_gemm(x, weight, offsets)
    y.sum().backward()  # an expanded gradient, which has stride zero
    reference = torch.cat([part @ matrix.T for part, matrix in zip(wide_x.split(counts), wide_weight, strict=True)])
    reference.sum().backward()
    assert y.shape == reference.shape
    for ours, theirs in ((y, reference), (x.grad, wide_x.grad), (weight.grad, wide_weight.grad)):
        assert ours is not None and theirs is not None
        if theirs.numel() and theirs.norm() > 0:
            assert (ours.double() - theirs).norm() / theirs.norm() <= bound
    assert weight.grad is not None
    for expert, count in enumerate(counts):
        if count == 0:
            assert not weight.grad[expert].any()


@pytest.mark.parametrize("width", [6, 16], ids=["unaligned", "aligned"])
def test_rows_that_are_not_aligned_take_the_loop(width: int) -> None:
    x, weight = torch.randn(4, width), torch.randn(2, 10, width)
    y = grouped_gemm(x, weight, torch.tensor([1, 4], dtype=torch.int32))
    expected = torch.cat([x[:1] @ weight[0].T, x[1:] @ weight[1].T])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


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
    gate, up = gate_up.chunk(2, dim=-1)
    expected = gate * gate.sigmoid() * up * probs[:, None]
    torch.testing.assert_close(weighted_swiglu(gate_up, probs), expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(weighted_swiglu, (gate_up, probs))
