"""Numbers in fewer bits: remainders give every master back, scaled types keep what they say, ranges are parts."""

import pytest
import torch
from torch import Tensor

from megatron.core.fusions import stored as stored_module
from megatron.core.fusions.stored import BLOCK, StateType, Stored, StoredRange, narrow_, new_stored


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


def _stored(kind: str, values: Tensor, positive: bool = False) -> Stored:
    stored = new_stored(StateType(kind, positive), torch.zeros(values.numel(), dtype=torch.bfloat16), _zeros)
    stored.write(values)
    return stored


def _check_masters(bits: Tensor) -> None:
    masters = bits.to(torch.int32).view(torch.float32)
    stored = _stored("bf16-remainder", masters)
    weights, back = stored.weights, stored.read()
    assert weights is not None
    number = ~masters.isnan()
    assert torch.equal(back.view(torch.int32)[number], masters.view(torch.int32)[number])
    assert back[~number].isnan().all() and weights[~number].isnan().all()
    # of the two neighbours none is nearer; in a tie the one that is further from zero is taken
    nearest = masters.bfloat16()
    tie = number & ((masters.view(torch.int32) & 0xFFFF) == 0x8000)
    assert torch.equal(weights[number & ~tie], nearest[number & ~tie])
    up = ((masters.view(torch.int32) >> 16) + 1).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(weights[tie], up[tie])
    rounded = torch.empty_like(weights)
    narrow_(rounded, masters)
    assert torch.equal(rounded.view(torch.int16), weights.view(torch.int16))


def test_a_weight_and_its_remainder_are_the_master() -> None:
    """All upper halves, subnormals, infinities and NaN among them, with the lower halves around each edge."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xC0DE])
    _check_masters((torch.arange(-(1 << 15), 1 << 15).unsqueeze(1) * 65536 + lower).view(-1))


@pytest.mark.slow
def test_all_masters_there_are_come_back() -> None:
    step = 1 << 21
    stored = _stored("bf16-remainder", torch.zeros(step))
    for begin in range(-(1 << 31), 1 << 31, step):
        masters = torch.arange(begin, begin + step, dtype=torch.int32).view(torch.float32)
        stored.write(masters)
        back = stored.read()
        same = torch.equal(back.view(torch.int32), masters.view(torch.int32))
        no_nan = {"nan": 1.0, "posinf": torch.inf, "neginf": -torch.inf}
        assert same or torch.equal(back.nan_to_num(**no_nan), masters.nan_to_num(**no_nan)), begin


@pytest.mark.parametrize(("kind", "mantissa", "steps"), [("fp16", 10, 24 + 15), ("fp8", 3, 9 + 7)])
def test_scaled_numbers_are_as_near_as_their_type_allows(kind: str, mantissa: int, steps: int) -> None:
    """The largest of a block to its mantissa, and what is smaller down to 2^-steps of it."""
    sizes = torch.logspace(-37, 37, 200).repeat_interleave(BLOCK)
    values = torch.randn(sizes.numel(), generator=torch.Generator().manual_seed(0)).exp() * sizes
    values *= torch.where(torch.arange(values.numel()) % 3 == 0, -1.0, 1.0)
    back = _stored(kind, values).read().float()
    largest = values.view(-1, BLOCK).abs().amax(dim=1).log2().floor().exp2().repeat_interleave(BLOCK)
    half_of_last_bit = values.abs().log2().floor().exp2() * 2.0 ** -(mantissa + 1)
    # a largest number that is rounded up to a power of two makes a scale twice as large
    coarsest = (largest.double() * 2.0**-steps).clamp(min=2.0**-127)  # nor is a scale smaller than float32 allows
    assert ((back - values).abs().double() <= torch.maximum(half_of_last_bit.double(), coarsest) * 1.0001).all()
    assert torch.equal(back.sign()[back != 0], values.sign()[back != 0])


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8"])
def test_what_can_be_kept_stays_as_it_is(kind: str) -> None:
    """So state that is saved, loaded and saved again does not wander off."""
    generator = torch.Generator().manual_seed(0)
    # nearly a power of two: rounding the largest number must not change the scale the second time
    values = torch.cat([torch.randn(40 * BLOCK, generator=generator) * 10.0**power for power in (-38, -20, 0, 30)])
    values[::BLOCK] = values[::BLOCK].abs().log2().ceil().exp2() * 8 * (1 - 2.0**-13)
    once = _stored(kind, values, positive=True)
    twice = _stored(kind, once.read(), positive=True)
    for ours, theirs in ((once.data, twice.data), (once.exponents, twice.exponents)):
        assert ours is theirs is None or torch.equal(ours, theirs)  # type: ignore[arg-type]
    assert once.read().dtype == once.dtype


@pytest.mark.parametrize("kind", ["fp16", "fp8"])
def test_a_second_moment_never_becomes_zero(kind: str) -> None:
    values = torch.ones(2 * BLOCK)
    values[1], values[2], values[3] = 1e-30, 1e-45, 0.0
    for positive in (True, False):
        back = _stored(kind, values, positive).read()
        assert ((back > 0) == (values > 0)).all() == positive and back[3] == 0
        assert (back[4:] == 1).all() and back[1] < 2.0**-15


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8", "bf16-remainder"])
def test_parts_and_ranges_are_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "_PIECE", 2 * BLOCK)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    stored = _stored(kind, values)
    whole = stored.read().clone()
    part = stored.part(slice(2 * BLOCK, 900))
    assert torch.equal(part.read(), whole[2 * BLOCK : 900]) and part.numel() == 900 - 2 * BLOCK
    some = StoredRange(part, 70, 700)
    assert (some.numel(), some.dtype, some.device.type) == (630, whole.dtype, "cpu")
    expected = whole[2 * BLOCK + 70 : 2 * BLOCK + 700]
    for place in (slice(None), slice(0, 1), slice(1, 65), slice(100, 630), slice(5, None), slice(629, 700)):
        assert torch.equal(some[place], expected[place]), place
    part.write(-part.read())
    assert torch.equal(stored.read()[2 * BLOCK : 900], -whole[2 * BLOCK : 900])
    assert torch.equal(stored.read()[: 2 * BLOCK], whole[: 2 * BLOCK]) and torch.equal(stored.read()[960:], whole[960:])
