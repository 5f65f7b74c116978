"""Shapes without values, where torch has no meta form; the number of rows of an expert is a value."""

from torch import Tensor


def grouped_product(x: Tensor, weight_EOI: Tensor, ends_E: Tensor, transpose: bool, backend: str) -> Tensor:
    """Of the right shape."""
    return x.new_empty(x.shape[0], weight_EOI.shape[1 if transpose else 2])


def grouped_weight_gradient_(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, beta: float) -> None:
    """There is nothing to write."""
