"""Multiplying by noise that depends on the place of an element in the run alone, and on no generator's state."""

import torch
from torch import Tensor

# Odd multipliers of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), as int64
_GAMMA, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _shift_right(bits: Tensor, count: int) -> Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)  # >> alone would carry the sign


def mixed(bits: Tensor) -> Tensor:
    """splitmix64's mixing function on int64 `bits`, modulo 2^64: every bit of the result depends on every bit."""
    bits = bits * _GAMMA  # zero and small numbers apart
    bits = (bits ^ _shift_right(bits, 30)) * _FIRST
    bits = (bits ^ _shift_right(bits, 27)) * _SECOND
    return bits ^ _shift_right(bits, 31)


def jittered(x_TH: Tensor, keys_T: Tensor, eps: float) -> Tensor:
    """x times noise uniform in [1 - eps, 1 + eps), drawn from each token's int64 key and the column; x's type."""
    columns = torch.arange(x_TH.shape[1], device=x_TH.device)
    bits = mixed(keys_T.unsqueeze(1) ^ mixed(columns + 1))
    uniform = _shift_right(bits, 11).double() * 2.0**-53
    return x_TH * (1 - eps + 2 * eps * uniform).to(x_TH.dtype)
