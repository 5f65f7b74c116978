"""The experts' operation where it is easily wrong: empty experts, dirty memory, expanded gradients, repeated runs."""

import pytest
import torch
import torch.nn.functional as F
from closeness import relative_error
from torch import Tensor

from megatron.core.fusions import linear
from megatron.core.fusions.expert_mlp import expert_mlp
from megatron.core.fusions.linear import Backend
from megatron.core.fusions.permute import (
    PermutationMap,
    combine,
    gather,
    permutation_map,
    scatter_weights,
)

HIDDEN, WIDTH, EXPERTS = 16, 24, 4
BACKENDS = ("loop", "grouped_mm")


def _drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _inputs(tokens: int, top_k: int, dtype: torch.dtype) -> list[Tensor]:
    """Tokens, probabilities and both weights."""
    wide = torch.promote_types(dtype, torch.float32)
    probs = _drawn(tokens, top_k, seed=1).double().sigmoid().to(wide)
    gate_up = _drawn(EXPERTS, 2 * WIDTH, HIDDEN, dtype=dtype, seed=2)
    return [_drawn(tokens, HIDDEN, dtype=dtype), probs, gate_up, _drawn(EXPERTS, HIDDEN, WIDTH, dtype=dtype, seed=3)]


def _run(
    inputs: list[Tensor], chosen_TK: Tensor, grad: Tensor, backend: Backend = "loop"
) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = expert_mlp(leaves[0], leaves[1], permutation_map(chosen_TK, EXPERTS), leaves[2], leaves[3], backend)
    y.backward(grad)
    return y.detach(), [leaf.grad for leaf in leaves]


def _plain(inputs: list[Tensor], chosen_TK: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """One expert after another, differentiated by autograd, in the inputs' own type."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    x, probs, gate_up, down = leaves
    y = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, choice = torch.where(chosen_TK == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, down[expert]) * probs[token, choice, None]
        y = y.index_add(0, token, rows.to(x.dtype))
    y.backward(grad)
    return y.detach(), [leaf.grad for leaf in leaves]


def _error(ours: Tensor | None, reference: Tensor | None) -> float:
    assert ours is not None and reference is not None
    return relative_error(ours, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_no_worse_than_a_plain_loop(backend: Backend) -> None:
    tokens = 257
    inputs = _inputs(tokens, 2, torch.bfloat16)
    chosen = _drawn(tokens, EXPERTS, seed=5).topk(2).indices
    grad = _drawn(tokens, HIDDEN, dtype=torch.bfloat16, seed=6)
    exact_y, exact = _plain([tensor.double() for tensor in inputs], chosen, grad.double())
    ours_y, ours = _run(inputs, chosen, grad, backend)
    plain_y, plain = _plain(inputs, chosen, grad)
    for mine, theirs, reference in zip([ours_y, *ours], [plain_y, *plain], [exact_y, *exact], strict=True):
        assert _error(mine, reference) <= min(6e-3, 1.5 * _error(theirs, reference))


CHOICES = {
    "the first is empty": [1, 2, 3],
    "one in the middle is empty": [0, 1, 3],
    "the last is empty": [0, 1, 2],
    "all to the first": [0],
    "all to the last": [3],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", CHOICES.values(), ids=list(CHOICES))
@pytest.mark.parametrize("tokens", [1, 7, 127, 129])
def test_empty_experts_have_no_gradient_in_memory_that_was_used(
    tokens: int, experts: list[int], backend: Backend
) -> None:
    inputs = _inputs(tokens, 1, torch.float32)
    chosen = torch.tensor(experts)[torch.arange(tokens) % len(experts)].unsqueeze(1)
    grad = _drawn(tokens, HIDDEN, seed=6)
    exact_y, exact = _plain([tensor.double() for tensor in inputs], chosen, grad.double())
    y, gradients = _run(inputs, chosen, grad, backend)
    for number, (mine, reference) in enumerate(zip([y, *gradients], [exact_y, *exact], strict=True)):
        # for one token the gradient of the probability is one number, a sum whose parts cancel
        assert _error(mine, reference) <= (4e-6 if number == 2 else 2e-6)

    weights = [tensor.clone().requires_grad_() for tensor in inputs[2:]]
    main_grads = [torch.full_like(weight, float("nan")) for weight in weights]
    for weight, main_grad in zip(weights, main_grads, strict=True):
        weight.gradient_sink = lambda write, out=main_grad: write(out, 0.0)  # type: ignore[attr-defined]
    index = permutation_map(chosen, EXPERTS)
    expert_mlp(inputs[0].requires_grad_(), inputs[1], index, *weights, backend).backward(grad)
    for main_grad, gradient in zip(main_grads, gradients[2:], strict=True):
        assert gradient is not None and torch.equal(main_grad, gradient)
        for expert in set(range(EXPERTS)) - set(chosen.flatten().tolist()):
            assert not main_grad[expert].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_the_gradient_of_a_sum_and_a_second_run(top_k: int, backend: Backend) -> None:
    tokens = 31
    inputs, chosen = _inputs(tokens, top_k, torch.float32), _drawn(tokens, EXPERTS, seed=5).topk(top_k).indices
    ones = torch.ones(tokens, HIDDEN)
    first = _run(inputs, chosen, ones, backend)
    for again in (_run(inputs, chosen, ones, backend), _run(inputs, chosen, ones[:1, :1].expand_as(ones), backend)):
        assert torch.equal(again[0], first[0])
        for a, b in zip(again[1], first[1], strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


def test_the_order_of_tokens_does_not_matter() -> None:
    tokens = 61
    inputs, chosen = _inputs(tokens, 2, torch.float64), _drawn(tokens, EXPERTS, seed=5).topk(2).indices
    order, grad = torch.randperm(tokens, generator=torch.Generator().manual_seed(7)), _drawn(tokens, HIDDEN).double()
    y, gradients = _run(inputs, chosen, grad)
    moved = [inputs[0][order], inputs[1][order], *inputs[2:]]
    moved_y, moved_gradients = _run(moved, chosen[order], grad[order])
    assert _error(moved_y, y[order]) <= 1e-14
    for number, (a, b) in enumerate(zip(moved_gradients, gradients, strict=True)):
        assert b is not None and _error(a, b[order] if number < 2 else b) <= 1e-14
    # nothing is computed when rows are moved: there it is exact
    rows, moved_rows = (
        gather(x, permutation_map(c, EXPERTS)) for x, c in ((inputs[0], chosen), (moved[0], chosen[order]))
    )
    assert torch.equal(
        combine(moved_rows, permutation_map(chosen[order], EXPERTS)),
        combine(rows, permutation_map(chosen, EXPERTS))[order],
    )


def test_rows_that_belong_to_no_expert_stay_out() -> None:
    """Where experts are padded to their capacity, or memory behind the last row was never written."""
    # pairs 0 ... 3 of two tokens are in rows 0, 2, 3 and nowhere; rows 1 and 4 are empty
    index = PermutationMap(torch.tensor([0, -1, 1, 2, -1]), torch.tensor([[0, 2], [3, -1]]), torch.tensor([2, 5]).int())
    y_RH, probs_R = torch.ones(5, 3), torch.ones(5)
    y_RH[[1, 4]], probs_R[[1, 4]] = float("nan"), float("nan")
    assert torch.equal(combine(y_RH, index), torch.tensor([[2.0] * 3, [1.0] * 3]))
    assert scatter_weights(probs_R, index).tolist() == [[1, 1], [1, 0]]
    assert gather(torch.ones(2, 3), index)[:, 0].tolist() == [1, 0, 1, 1, 0]


def test_a_loop_of_products_asks_once_where_rows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a device is waiting for it; a copy stands for what has come from one."""
    copies, asked, rows_of_experts = [], [], linear._rows_of_experts
    copy = Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        copies.append(copy(tensor).clone())
        return copies[-1]

    def noted(ends_E: Tensor) -> list[slice]:
        asked.append(ends_E)
        return rows_of_experts(ends_E)

    monkeypatch.setattr(Tensor, "cpu", counted)
    monkeypatch.setattr(linear, "_rows_of_experts", noted)
    # float64 has no kernel: two products, two data gradients, two weight gradients, which have kernels on a GPU
    _run(_inputs(5, 2, torch.float64), torch.arange(10).view(5, 2) % 3, _drawn(5, HIDDEN, dtype=torch.float64))
    assert len(copies) == 1
    assert [ends.data_ptr() == copies[0].data_ptr() for ends in asked] == [True, True, True, False, True, False]
