"""AdamW in every form and with every way of keeping its numbers, against the formulas in `stored.py`."""

from typing import NamedTuple

import pytest
import torch
from closeness import relative_error
from conformance_testing import INSTRUCTION_SETS, device_of, each, only
from torch import Tensor

from megatron.core.fusions.adamw import AdamWStep, adamw_
from megatron.core.fusions.stored import BLOCK, StateType, Stored, narrow_, new_stored

STEP = AdamWStep(7, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.25)


class Kept(NamedTuple):
    """Types of a segment's numbers."""

    master: str = "fp32"
    exp_avg: str = "fp32"
    exp_avg_sq: str = "fp32"
    grad: torch.dtype = torch.float32
    weights: torch.dtype | None = torch.bfloat16


KEPT = {
    "float32": Kept(weights=None),
    "masters": Kept(),
    "remainders": Kept(master="bf16-remainder"),
    "bf16 gradients": Kept(grad=torch.bfloat16),
    "bf16": Kept("bf16-remainder", "bf16", "bf16", torch.bfloat16),
    "fp16": Kept("fp32", "fp16", "fp16", weights=None),
    "fp8": Kept("bf16-remainder", "fp8", "fp8"),
    "fp8 and fp16": Kept("fp32", "fp8", "fp16", torch.bfloat16),
    "bf16 and fp8": Kept("fp32", "bf16", "fp8"),
}
each_kept = pytest.mark.parametrize("kept", KEPT.values(), ids=list(KEPT))
each_form = pytest.mark.parametrize("form", each("formula", "triton", *INSTRUCTION_SETS))


class Operands(NamedTuple):
    master: Stored
    exp_avg: Stored
    exp_avg_sq: Stored
    grad: Tensor
    weights: Tensor | None


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


def _operands(kept: Kept, numbers: tuple[Tensor, Tensor, Tensor, Tensor], device: str = "cpu") -> Operands:
    """The numbers as they are kept; masters, first and second moments, gradients."""
    like = torch.zeros(numbers[0].numel(), dtype=torch.bfloat16, device=device)
    types = (StateType(kept.master), StateType(kept.exp_avg), StateType(kept.exp_avg_sq, positive=True))
    stored = [new_stored(kind, like.clone(), _zeros) for kind in types]
    for each_stored, values in zip(stored, numbers, strict=False):
        each_stored.write(values.to(device))
    weights = None if kept.weights is None or kept.master != "fp32" else like.to(kept.weights)
    return Operands(*stored, numbers[3].to(device, kept.grad), weights)


def _drawn(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normal numbers, whose moments have another size in each block, down to what a float32 can just hold."""
    generator = torch.Generator().manual_seed(0)
    master, m, v, grad = torch.randn(4, size, generator=generator).unbind()
    sizes = torch.logspace(-12, 2, -(-size // BLOCK)).repeat_interleave(BLOCK)[:size]
    return master, m * sizes, (v * sizes).square(), grad * sizes


def _bits(stored: Stored) -> list[Tensor]:
    return [part.cpu() for part in (stored.data, stored.exponents, stored.weights) if part is not None]


def _places(stored: Stored) -> Tensor:
    """The number of each bit pattern in the order of what they stand for; remainders are numbers themselves."""
    bits = stored.data.cpu().view(torch.uint8 if stored.data.itemsize == 1 else torch.int16).int()
    if stored.weights is not None:
        return bits
    half = 1 << (8 * stored.data.itemsize - 1)
    sizes = bits & (half - 1)
    return torch.where((bits & half) != 0, -sizes, sizes)


@each_form
@each_kept
def test_is_the_papers_formula(form: str, kept: Kept) -> None:
    # several pieces of work, and a block that is not whole
    ours = _operands(kept, _drawn(5003 if form == "triton" else 70001), device_of(form))
    w, m, v = (stored.read().cpu().double() for stored in ours[:3])
    g = ours.grad.cpu().double() * 0.25
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    w = w * (1 - 1e-2 * 0.1) - 1e-2 * (m / (1 - 0.9**7)) / ((v / (1 - 0.95**7)).sqrt() + 1e-8)
    with only(form) as used:
        adamw_(*ours[:4], STEP, ours.weights)
    assert ("adamw_" in used) == (form != "formula")
    for stored, values in zip(ours[:3], (w, m, v), strict=True):
        expected = _operands(kept, (values.float(),) * 4)[ours.index(stored)]
        if stored.exponents is None and stored.dtype == torch.float32:
            assert relative_error(stored.read().cpu(), values) <= 1e-7
            continue
        # near ties, of which short numbers make many, the last bit of a float32 decides; scales are the same
        codes, theirs = _places(stored), _places(expected)
        assert (codes - theirs).abs().max() <= 1 and (codes != theirs).float().mean() < 2e-2
        if stored.exponents is not None and expected.exponents is not None:
            assert torch.equal(stored.exponents.cpu(), expected.exponents)
    if ours.weights is not None:
        rounded = torch.empty_like(ours.weights)
        narrow_(rounded, ours.master.read())
        assert torch.equal(ours.weights, rounded)


def _awkward() -> Tensor:
    """Numbers at the edges of every narrow type: ties, subnormals, zeros, blocks that are nearly or wholly zero."""
    generator = torch.Generator().manual_seed(1)
    mantissas = torch.tensor(
        [
            1.0,
            1 + 2**-8,
            1 + 3 * 2**-8,
            1 + 2**-11,
            1 + 3 * 2**-11,
            1.0625,
            1.1875,
            1.9375,
            1.96875,
            2 - 2**-12,
            1 + 2**-23,
        ]
    )
    powers = torch.arange(-149.0, 64.0).repeat(len(mantissas), 1)
    edges = (mantissas.unsqueeze(1).double() * powers.exp2()).float().view(-1)
    signs = torch.randint(0, 2, edges.shape, generator=generator) * 2 - 1
    shuffled = (edges * signs)[torch.randperm(edges.numel(), generator=generator)]
    close = torch.randn(64 * BLOCK, generator=generator).exp() * torch.logspace(-30, 15, 64).repeat_interleave(BLOCK)
    return torch.cat((edges, -edges, torch.zeros(2 * BLOCK), shuffled, close, torch.tensor([1e-45, 0.0, -1e-45])))


@each_form
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8"])
def test_rounds_as_the_formula_does(form: str, kind: str) -> None:
    """With betas of 0 the moments are the gradient and its square."""
    values = _awkward()
    zeros = torch.zeros_like(values)
    kept = Kept("fp32", kind, kind, weights=None)
    ours = _operands(kept, (zeros, zeros, zeros, values), device_of(form))
    expected = _operands(kept, (zeros, values, values * values, values))
    with only(form):
        adamw_(*ours[:4], AdamWStep(1, 0.0, 0.0, 0.0, 1e-8, 0.0, 1.0), None)
    for number in (1, 2):
        for mine, theirs in zip(_bits(ours[number]), _bits(expected[number]), strict=True):
            # a zero may have lost its sign in the sum
            assert torch.equal(mine, theirs) or torch.equal(ours[number].read(), expected[number].read())
    assert torch.equal(ours.exp_avg_sq.read().cpu() > 0, values * values > 0) or kind == "bf16"


@each_form
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8"])
def test_what_was_kept_is_kept_again(form: str, kind: str) -> None:
    """Betas that are 1 in float32: reading, and writing the same, changes no bit."""
    kept = Kept("bf16-remainder", kind, kind)
    values = _awkward()
    ours = _operands(kept, (values, values, values.abs(), torch.zeros_like(values)), device_of(form))
    before = [_bits(stored) for stored in ours[:3]]
    almost_one = 1 - 2.0**-50
    with only(form):
        adamw_(*ours[:4], AdamWStep(1, 0.0, almost_one, almost_one, 1e-8, 0.0, 1.0), None)
    for stored, bits in zip(ours[:3], before, strict=True):
        for now, then in zip(_bits(stored), bits, strict=True):
            assert torch.equal(now, then)


@each_form
def test_remainders_are_the_masters_bit_for_bit(form: str) -> None:
    numbers = _drawn(5 * 1024 - BLOCK)  # whole blocks
    wide, split = (_operands(Kept(master), numbers, device_of(form)) for master in ("fp32", "bf16-remainder"))
    with only(form):
        for number in range(1, 4):
            for ours in (wide, split):
                adamw_(*ours[:3], numbers[3].clone().to(device_of(form)), STEP._replace(number=number), ours.weights)
    assert wide.weights is not None and split.master.weights is not None
    assert torch.equal(wide.weights, split.master.weights)
    for ours, theirs in zip(wide[:3], split[:3], strict=True):
        assert torch.equal(ours.read(), theirs.read())
