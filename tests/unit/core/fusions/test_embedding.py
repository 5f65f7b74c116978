"""The embedding's lookup and the gradient of its table."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.fusions.embedding import lookup


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (5, 3), generator=generator)  # rows 7 to 10 are never looked up
    scale = torch.randn(5, 3, 4, generator=generator).to(dtype)
    ours, theirs = (torch.arange(44.0).view(11, 4).to(dtype).requires_grad_() for _ in range(2))
    result, expected = lookup(ids, ours), F.embedding(ids, theirs)
    assert torch.equal(result, expected)
    (result * scale).sum().backward()
    (expected * scale).sum().backward()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_the_sink_gets_sums_in_its_own_type(beta: float) -> None:
    weight = torch.zeros(6, 2, dtype=torch.bfloat16, requires_grad=True)
    main_grad = torch.full((6, 2), float("nan") if beta == 0 else 8.0)
    weight.gradient_sink = lambda write: write(main_grad, beta)
    # each summand of row 3 would be lost in bfloat16 next to the first
    lookup(torch.tensor([3] * 9 + [0]), weight).mul(torch.tensor([256.0] + [1.0] * 9).unsqueeze(1)).sum().backward()
    before = 8.0 * beta
    assert weight.grad is None
    assert main_grad[:, 0].tolist() == [before + 1, before, before, before + 264, before, before]
