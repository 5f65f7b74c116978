"""Tests of the C++ kernels alone, which go with megatron/core/fusions/kernels/cpu."""

import shutil
from collections.abc import Iterator

import pytest

from megatron.core.fusions.kernels.cpu import wrapper


@pytest.fixture(autouse=True)
def _needs_the_extension() -> None:
    if wrapper.MISSING and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert not wrapper.MISSING, f"install the package again: the extension is {wrapper.MISSING}"


@pytest.fixture(params=["plain", "avx2", "avx512", "amx"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each in turn; those that this machine does not have are skipped."""
    assert wrapper.kernels_cpp is not None
    sets = wrapper.kernels_cpp.instruction_sets()
    if request.param not in sets:
        pytest.skip(f"this processor has no {request.param}")
    wrapper.kernels_cpp.choose_instruction_set(request.param)
    yield request.param
    wrapper.kernels_cpp.choose_instruction_set(sets[0])
