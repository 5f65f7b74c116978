"""Products into given tensors, the blocks that wide ones are cut into, and where their weight's gradient goes."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.fusions.kernels.library.cpu import ALIGNED, blocks
from megatron.core.fusions.linear import linear, multiply_


@pytest.mark.parametrize("longest", [1, 7, 64, 100, 128, 1024])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000, 32000])
def test_blocks_cover_everything_and_start_at_whole_cache_lines(length: int, longest: int) -> None:
    made = blocks(length, longest)
    assert [i for block in made for i in range(block.start, block.stop)] == list(range(length))
    sizes = [block.stop - block.start for block in made]
    step = ALIGNED if longest >= ALIGNED else 1
    assert max(sizes) <= longest and all(block.start % step == 0 for block in made)
    assert max(sizes) - min(sizes[:-1], default=max(sizes)) <= step, "of nearly equal size, but for a shorter last one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_of_nothing_it_is_what_was_there(dtype: torch.dtype, beta: float) -> None:
    out = torch.full((3, 5), 4.0 if beta else torch.nan)
    multiply_(torch.empty(3, 0, dtype=dtype), torch.empty(0, 5, dtype=dtype), out, beta)
    assert torch.equal(out, torch.full((3, 5), 4.0 * beta))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_linear_layer_equals_torchs(dtype: torch.dtype | None) -> None:
    x, weight = torch.randn(5, 3, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    if dtype is not None:  # computed wider than its operands
        x, weight = x.float(), weight.float()
    ours, theirs = ([part.clone().requires_grad_() for part in (x, weight)] for _ in range(2))
    y, expected = linear(*ours, dtype), F.linear(theirs[0].double(), theirs[1].double())
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    grad = torch.randn_like(expected)
    y.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and a.grad.dtype == a.dtype
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6 if dtype else 1e-13, atol=1e-13)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_gradient_of_a_narrow_weight_reaches_its_sink_unrounded(beta: float) -> None:
    x = torch.randn(64, 8).bfloat16()
    weight = torch.randn(6, 8).bfloat16().requires_grad_()
    main_grad = torch.full((6, 8), float("nan") if beta == 0 else 2.0)
    weight.gradient_sink = lambda write: write(main_grad, beta)  # type: ignore[attr-defined]
    grad = torch.randn(64, 6)
    linear(x, weight, torch.float32).backward(grad)
    assert weight.grad is None
    torch.testing.assert_close(main_grad, grad.T @ x.float() + 2.0 * beta, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_is_computed() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None
    frozen = weight.detach()
    frozen.gradient_sink = lambda write: pytest.fail("it has no gradient")  # type: ignore[attr-defined]
    linear(x.requires_grad_(), frozen).sum().backward()
    assert x.grad is not None
