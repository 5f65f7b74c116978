"""The operations with their kernels behind them equal their PyTorch forms, outputs and gradients."""

from collections.abc import Callable

import pytest
import torch
from kernel_testing import assert_close, drawn
from torch import Tensor

from megatron.core.fusions import backend, grouped_gemm
from megatron.core.fusions.expert_mlp import expert_mlp
from megatron.core.fusions.permute import combine_rows, gather_rows, permutation_map
from megatron.core.fusions.rms_norm import rms_norm
from megatron.core.fusions.rotary import apply_rotary, rotary_tables
from megatron.core.fusions.router import top_k_routing
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.cross_entropy import output_cross_entropy


def _norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (rms_norm(x.transpose(0, 1), weight, 1e-5),)


def _rotary(x: Tensor) -> tuple[Tensor, ...]:
    batch, _, length, width = x.shape
    shared = rotary_tables(torch.arange(length, device=x.device), width, 10000.0, x.dtype)
    own = rotary_tables(torch.arange(batch * length, device=x.device).view(batch, -1), width, 10000.0, x.dtype)
    return apply_rotary(x, *shared), apply_rotary(x, *own)


def _experts(x_TH: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    routing = top_k_routing(logits_TE, 2)
    index = permutation_map(routing.experts_TK, logits_TE.shape[1])
    y = expert_mlp(x_TH, routing.probs_TK, index, gate_up, down)
    return y, routing.softmax_TE, routing.logsumexp_T, routing.tokens_per_expert_E


def _some_pairs_elsewhere(x_TH: Tensor, scores_TE: Tensor) -> tuple[Tensor, ...]:
    experts = scores_TE.topk(2).indices - 1
    here = (experts >= 0) & (experts < 3)
    index = permutation_map(experts, 3, int(here.sum()))
    rows = gather_rows(x_TH, index)
    return rows, combine_rows(rows * 2, index)


def _loss(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    targets = torch.arange(x.shape[0], device=x.device) * 3
    return (output_cross_entropy(x, weight, targets, 40, Group(), False),)


CASES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (_norm, ((5, 3, 24), (24,))),
    "rotary": (_rotary, ((2, 3, 5, 8),)),
    "experts": (_experts, ((13, 24), (13, 5), (5, 16, 24), (5, 24, 8))),
    "some pairs elsewhere": (_some_pairs_elsewhere, ((13, 24), (13, 5))),
    "output layer": (_loss, ((13, 24), (48, 24))),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_plain_form(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    function, shapes = CASES[name]

    def run(triton: bool, dtype: torch.dtype) -> list[Tensor]:
        calls = []

        def choose(*_: Tensor) -> bool:
            calls.append(triton)
            return triton

        monkeypatch.setattr(backend, "runs_triton", choose)
        monkeypatch.setattr(backend, "runs_triton_on", choose)
        inputs = [drawn(shape, torch.float32, device, i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
        outputs = function(*inputs)
        total = torch.stack([(out * (i + 1)).square().sum() for i, out in enumerate(outputs)]).sum()
        total.backward()
        assert calls, "nothing asked which form to run"
        return [*outputs, *(tensor.grad for tensor in inputs if tensor.grad is not None)]

    for ours, reference in zip(run(True, torch.float32), run(False, torch.float64), strict=True):
        assert_close(ours, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["loop", "grouped_mm"])
@pytest.mark.parametrize("tokens", [0, 1, 131])
def test_experts_in_bfloat16(tokens: int, products: grouped_gemm.Backend, device: torch.device) -> None:
    shapes = ((tokens, 64), (5, 2 * 48, 64), (5, 64, 48))
    inputs = [drawn(shape, torch.bfloat16, device, i) for i, shape in enumerate(shapes)]
    probs = drawn((tokens, 2), torch.float32, device, 3).sigmoid()
    chosen = drawn((tokens, 5), torch.float32, device, 4).topk(2).indices
    grad = drawn((tokens, 64), torch.bfloat16, device, 5)

    def run(dtype: torch.dtype) -> list[Tensor]:
        x, gate_up, down = (tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs)
        weights = probs.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        y = expert_mlp(x, weights, permutation_map(chosen, 5), gate_up, down, products)
        y.backward(grad.to(dtype))
        return [y, *(leaf.grad for leaf in (x, weights, gate_up, down) if leaf.grad is not None)]

    ours, reference = run(torch.bfloat16), run(torch.float64)
    assert len(ours) == 5
    for a, b in zip(ours, reference, strict=True):
        # probabilities are in float32, but what their gradients are made of is not
        assert_close(a.to(torch.bfloat16), b)


def test_kernels_repeat_themselves_and_leave_no_dirt(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs_triton", "runs_triton_on"):
        monkeypatch.setattr(backend, name, lambda *_: True)
    tokens, experts = 13, 5
    x, probs = drawn((tokens, 24), torch.float32, device), drawn((tokens, 2), torch.float32, device, 1).sigmoid()
    scores = drawn((tokens, experts), torch.float32, device, 2)
    scores[:, 1] -= 100  # nobody chooses this one
    index = permutation_map(scores.topk(2).indices, experts)

    def run() -> list[Tensor]:
        weights = [drawn(shape, torch.float32, device, 3).requires_grad_() for shape in ((5, 16, 24), (5, 24, 8))]
        main_grads = [torch.full_like(weight, float("nan")) for weight in weights]
        for weight, main_grad in zip(weights, main_grads, strict=True):
            weight.gradient_sink = lambda write, out=main_grad: write(out, 0.0)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, probs)]
        y = expert_mlp(*leaves, index, *weights)
        y.sum().backward()
        return [y, *main_grads, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    first, second = run(), run()
    assert len(first) == 5
    for a, b in zip(first, second, strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)
    assert not first[1][1].any() and not first[2][1].any()
