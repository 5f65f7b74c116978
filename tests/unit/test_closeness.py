"""One measure of closeness for all tests."""

import math
import re
from pathlib import Path

import pytest
import torch
from closeness import BOUNDS, relative_error

TESTS = Path(__file__).resolve().parents[1]
COPY = re.compile(r"\.norm\(\)\s*/[^\n]*\.norm\(\)")


def test_the_error_is_relative_to_the_reference() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    assert relative_error(reference, reference) == 0.0
    assert relative_error(reference + torch.tensor([0.0, 0.5]), reference) == pytest.approx(0.1)
    zeros = torch.zeros(2)
    assert relative_error(zeros, zeros) == relative_error(zeros[:0], zeros[:0]) == 0.0
    assert relative_error(torch.tensor([0.0, 1e-20]), zeros) > 1.0
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), reference))
    with pytest.raises(AssertionError):
        relative_error(zeros, torch.zeros(1))


def test_bounds_are_a_few_roundings() -> None:
    for dtype, bound in BOUNDS.items():
        assert 0.5 * torch.finfo(dtype).eps < bound < 2**13 * torch.finfo(dtype).eps


def test_no_test_has_a_measure_of_its_own() -> None:
    files = [path for path in TESTS.rglob("*.py") if path.name != "closeness.py"]
    copies = [str(path.relative_to(TESTS)) for path in files if COPY.search(path.read_text(encoding="utf-8"))]
    assert len(files) > 100 and copies == []
