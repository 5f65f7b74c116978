"""How the optimizer's numbers lie in memory between two updates: in float32, or in fewer bits.

Everything rounds to nearest, without random numbers: so an update is a function of what it gets, on every rank and in
every run. docs/optimizer.md has the formulas.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Neighbouring numbers with one scale. Every parameter, and every rank's shard, begins with a block."""

_PIECE = 1 << 22
"""Numbers that are converted at a time, a multiple of BLOCK: all at once would take several times their memory."""

MomentType = Literal["fp32", "bf16", "fp16", "fp8"]
MasterType = Literal["fp32", "bf16-remainder"]
Zeros = Callable[[int, torch.dtype, torch.device], Tensor]
"""Makes memory for as long as the run lasts."""


LARGEST_BETA = {"bf16": 1 - 2.0**-8, "fp16": 1 - 2.0**-11, "fp8": 1 - 2.0**-4}
"""Of an average in each type: a decay by less than half of the last bit is rounded away."""


class StateType(NamedTuple):
    """What a tensor of the optimizer's state is kept in; fp32 is float64 where the parameters are."""

    name: MomentType | MasterType = "fp32"
    positive: bool = False
    """Whether a scaled number above zero stays above zero, so that one can divide by it."""


class Scaled(NamedTuple):
    """A narrow floating type whose numbers are divided by the scale of their block."""

    dtype: torch.dtype
    mantissa: int
    """Bits behind the point."""
    bias: int
    """Of the exponent."""
    most: float
    """Largest number."""
    exact: torch.dtype
    """The narrowest type that holds a number times its scale."""

    @property
    def top(self) -> int:
        """A block's largest number, rounded, lies between 2^top and 2^(top + 1), which float8_e4m3fn has not whole."""
        return self.bias

    @property
    def lowest(self) -> int:
        """Smallest biased exponent of a scale: the smallest number times the scale is a normal float32."""
        return self.bias + self.mantissa


FLOAT16 = Scaled(torch.float16, 10, 15, 65504.0, torch.float32)
FLOAT8 = Scaled(torch.float8_e4m3fn, 3, 7, 448.0, torch.bfloat16)
_BY_NAME = {"fp16": FLOAT16, "fp8": FLOAT8}


@dataclass(frozen=True, eq=False)
class Stored:
    """Flat numbers [n] as they are kept between updates."""

    data: Tensor
    """[n]: the numbers themselves; or divided by scales, in float16 or as bits of float8_e4m3fn (uint8); or int16
    remainders."""
    exponents: Tensor | None = None
    """Of scaled numbers: uint8 [ceil(n / BLOCK)]; a block's scale is 2^(exponent - 127)."""
    weights: Tensor | None = None
    """Of remainders: the bfloat16 weights [n], which are the upper halves of the numbers."""
    positive: bool = False
    """See `StateType`."""

    @property
    def format(self) -> Scaled | None:
        """That of scaled numbers."""
        if self.exponents is None:
            return None
        return FLOAT8 if self.data.dtype == torch.uint8 else FLOAT16

    @property
    def plain(self) -> bool:
        """Whether `data` is the numbers themselves."""
        return self.exponents is None and self.weights is None

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds the numbers exactly; that of `read`."""
        if self.format is not None:
            return self.format.exact
        return self.data.dtype if self.weights is None else torch.float32

    def numel(self) -> int:
        """How many numbers."""
        return self.data.numel()

    def part(self, place: slice) -> "Stored":
        """A view of some of them, from the beginning of a block if they are scaled."""
        exponents, weights = self.exponents, self.weights
        if exponents is not None:
            assert place.start % BLOCK == 0, place
            exponents = exponents[place.start // BLOCK : -(-place.stop // BLOCK)]
        return Stored(self.data[place], exponents, None if weights is None else weights[place], self.positive)

    def read(self) -> Tensor:
        """The numbers, [n]: `data` itself where it is plain, otherwise a copy."""
        if self.plain:
            return self.data
        values = torch.empty(self.data.shape, dtype=self.dtype, device=self.data.device)
        for place in _pieces(self.numel()):
            part = self.part(place)
            if part.weights is not None:
                values[place] = join_remainders(part.weights, part.data)
            elif part.exponents is not None and part.format is not None:
                values[place] = decode(part.data, part.exponents, part.format)
        return values

    def write(self, values: Tensor) -> None:
        """Sets all numbers, to the nearest that can be kept; with remainders sets the weights too."""
        if self.plain:
            self.data.copy_(values)
            return
        for place in _pieces(self.numel()):
            part, numbers = self.part(place), values[place].float()
            if part.weights is not None:
                split_remainders(numbers, part.weights, part.data)
            elif part.exponents is not None and part.format is not None:
                encode(numbers, part.data, part.exponents, part.format, self.positive)


@dataclass(frozen=True, eq=False)
class StoredRange:
    """Some of the stored numbers, made when they are asked for: `range[begin:end]` is a tensor of them."""

    stored: Stored
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.stored.data.device

    def numel(self) -> int:
        """How many."""
        return self.end - self.start

    def __getitem__(self, place: slice) -> Tensor:
        begin, end = self.start + (place.start or 0), self.end if place.stop is None else self.start + place.stop
        first = begin // BLOCK * BLOCK
        return self.stored.part(slice(first, min(end, self.end))).read()[begin - first :]


def new_stored(kind: StateType, like: Tensor, zeros: Zeros) -> Stored:
    """Zeros in the type `kind`, for weights `like` [n]; remainders of zero, which make the masters the weights."""
    size, device = like.numel(), like.device
    if kind.name == "bf16-remainder":
        assert like.dtype == torch.bfloat16, like.dtype
        return Stored(zeros(size, torch.int16, device), weights=like)
    if kind.name not in _BY_NAME:
        wide = torch.promote_types(like.dtype, torch.float32)
        return Stored(zeros(size, torch.bfloat16 if kind.name == "bf16" else wide, device))
    dtype = torch.uint8 if kind.name == "fp8" else torch.float16
    exponents = zeros(-(-size // BLOCK), torch.uint8, device)
    return Stored(zeros(size, dtype, device), exponents, positive=kind.positive)


def narrow_(weights: Tensor, masters: Tensor) -> None:
    """Sets the model's weights to the masters rounded to nearest, in bfloat16 halves away from zero.

    Halves to even would be ambiguous: 65,537 masters belong to an even weight then, one more than there are remainders.
    """
    if weights.dtype != torch.bfloat16 or masters.dtype != torch.float32:
        weights.copy_(masters)
        return
    for place in _pieces(weights.shape[0]):
        weights[place] = _upper(masters[place].contiguous()).view(torch.bfloat16)


def _upper(masters: Tensor) -> Tensor:
    """The upper 16 bits after rounding, int16; NaN stays NaN."""
    bits = masters.view(torch.int32)
    rounded = ((bits + 0x8000) >> 16).to(torch.int16)  # wraps around in NaN alone
    return torch.where(masters.isnan(), torch.full_like(rounded, 0x7FC0), rounded)


def split_remainders(masters: Tensor, weights: Tensor, remainders: Tensor) -> None:
    """Float32 masters [n] into bfloat16 weights and int16 remainders, which give the masters back bit for bit.

    bits(master) = 2^16 bits(weight) + remainder, with -2^15 <= remainder < 2^15. A NaN stays a NaN.
    """
    narrow_(weights, masters)
    low = masters.contiguous().view(torch.int32).to(torch.int16)
    remainders.copy_(torch.where(masters.isnan(), torch.zeros_like(low), low))


def join_remainders(weights: Tensor, remainders: Tensor) -> Tensor:
    """The float32 masters [n]."""
    return ((weights.view(torch.int16).int() << 16) + remainders).view(torch.float32)


def _pieces(size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + _PIECE, size)) for begin in range(0, size, _PIECE))


def _blocks(values: Tensor) -> Tensor:
    """[n] -> [blocks, BLOCK], zeros behind the last."""
    missing = -values.numel() % BLOCK
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def _power(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) of biased exponents from 1 to 254."""
    return (exponents.int() << 23).view(torch.float32)


def encode(values: Tensor, data: Tensor, exponents: Tensor, kind: Scaled, positive: bool) -> None:
    """Float32 [n] into scaled numbers: x / scale to nearest, ties to even, with scales that are powers of two.

    A block's largest number, after rounding, decides about the scale. So what `decode` gives has the same scale, and
    encoding it changes nothing.
    """
    blocks = _blocks(values.contiguous())
    largest = blocks.abs().amax(dim=1).view(torch.int32)
    scales = (((largest + (1 << (22 - kind.mantissa))) >> 23) - kind.top).clamp(min=kind.lowest)
    scaled = blocks * _power(254 - scales).unsqueeze(1)
    narrow = scaled.clamp(-kind.most, kind.most).to(kind.dtype)
    bits = narrow.view(torch.uint8 if kind is FLOAT8 else torch.int16)
    if positive:
        bits = torch.where((blocks > 0) & (bits == 0), torch.ones_like(bits), bits)
    data.copy_(bits.view(data.dtype).view(-1)[: data.numel()])
    exponents.copy_(scales)


def decode(data: Tensor, exponents: Tensor, kind: Scaled) -> Tensor:
    """Scaled numbers [n] times their scales, in the type that holds these exactly."""
    numbers = data.view(kind.dtype).float()
    scales = _power(exponents).repeat_interleave(BLOCK)[: numbers.numel()]
    return (numbers * scales).to(kind.exact)
