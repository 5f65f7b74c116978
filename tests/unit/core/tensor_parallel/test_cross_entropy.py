"""The output layer's cross entropy in one process; the layout tests cover the split one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions.kernels.library.cpu import blocks
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel import cross_entropy
from megatron.core.tensor_parallel.cross_entropy import output_cross_entropy

VOCABULARY, PADDED = 20, 24


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, scale = (torch.randn(shape, generator=generator) for shape in ((7, 3, 16), (PADDED, 16), (7, 3)))
    weight[VOCABULARY:] *= 1e3  # padding that would win
    return x.to(dtype), weight.to(dtype), torch.randint(0, VOCABULARY, (7, 3), generator=generator), scale.double()


@pytest.mark.parametrize("tokens_at_once", [100, 21, 4, 1])
@pytest.mark.parametrize("columns_in_a_block", [1, 5, 22, PADDED])
def test_equals_torch_in_any_number_of_pieces(
    tokens_at_once: int, columns_in_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", tokens_at_once * PADDED)
    monkeypatch.setattr(cross_entropy, "vocabulary_blocks", lambda *_: blocks(PADDED, columns_in_a_block))
    x, weight, targets, scale = _inputs(torch.float64)
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = output_cross_entropy(*ours, targets, VOCABULARY, Group(), False)
    logits = (theirs[0] @ theirs[1].t())[..., :VOCABULARY]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(7, 3)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (loss * scale).sum().backward()
    (expected * scale).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens_at_once", [100, 4])
def test_a_long_sequence_keeps_no_logits(tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", tokens_at_once * PADDED)
    x, weight, targets, _ = _inputs(torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets, VOCABULARY, Group(), False)
    logits = [tensor for tensor in kept if tensor.shape[-1:] == (PADDED,)]
    assert len(logits) == (1 if tokens_at_once == 100 else 0)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + (2 + len(logits)) * targets.numel() + sum(
        t.numel() for t in logits
    )


def test_the_gradient_goes_straight_to_the_sink() -> None:
    x, weight, targets, _ = _inputs(torch.float32)
    plain, with_sink = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    main_grad = torch.ones_like(weight)
    with_sink.gradient_sink = lambda write: write(main_grad, 1.0)
    for parameter in (plain, with_sink):
        loss = output_cross_entropy(x.clone().requires_grad_(), parameter, targets, VOCABULARY, Group(), False)
        loss.sum().backward()
    assert with_sink.grad is None and plain.grad is not None
    torch.testing.assert_close(main_grad, plain.grad + 1)
    assert not plain.grad[VOCABULARY:].any()


def test_bfloat16_logits_are_widened() -> None:
    x, weight, targets, _ = _inputs(torch.bfloat16)
    loss = output_cross_entropy(x, weight, targets, VOCABULARY, Group(), False)
    assert loss.dtype == torch.float32
    logits = (x @ weight.t()).float()[..., :VOCABULARY]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(7, 3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_output_layer_gets_no_gradient_and_passes_one_on() -> None:
    x, weight, targets, _ = _inputs(torch.float64)
    frozen, free = x.clone().requires_grad_(), x.clone().requires_grad_()
    output_cross_entropy(free, weight.clone().requires_grad_(), targets, VOCABULARY, Group(), False).sum().backward()
    weight.gradient_sink = lambda write: pytest.fail("a frozen weight got a gradient")  # type: ignore[attr-defined]
    output_cross_entropy(frozen, weight, targets, VOCABULARY, Group(), False).sum().backward()
    assert torch.equal(frozen.grad, free.grad)
