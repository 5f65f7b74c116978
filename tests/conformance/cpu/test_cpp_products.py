"""Products in C++: any strides, edges of tiles, old contents ignored, nothing written outside the output."""

import math

import pytest
import torch
from closeness import BOUNDS, relative_error
from conformance_testing import INSTRUCTION_SETS
from torch import Tensor

from megatron.core.fusions.kernels.cpu import wrapper
from megatron.core.fusions.linear import multiply_

SIZES = [(1, 1, 1), (5, 3, 7), (6, 64, 64), (13, 65, 129), (63, 513, 65), (390, 17, 200), (700, 520, 70), (4, 0, 9)]
NARROW_SIZES = [(1, 1, 1), (5, 3, 7), (32, 32, 32), (33, 65, 31), (16, 64, 48), (63, 513, 65), (390, 17, 200),
                (700, 1030, 540), (4, 0, 9)]  # fmt: skip
TRANSPOSED = pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
BETA = pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
OUT_TYPES = pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
needs_tiles = pytest.mark.skipif("amx" not in INSTRUCTION_SETS, reason="needs a processor with AMX")


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _check_product(
    rows: int, inner: int, columns: int, beta: float, transposed: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    """C = beta C + A B in the middle of wider matrices that hold NaN."""

    def part(rows: int, columns: int) -> Tensor:
        whole = torch.full((rows + 2, columns + 3), math.nan, dtype=dtype)
        whole[1:-1, 1:-2] = _randn(rows, columns, dtype=dtype)
        return whole[1:-1, 1:-2]

    a = part(inner, rows).t() if "a" in transposed else part(rows, inner)
    b = part(columns, inner).t() if "b" in transposed else part(inner, columns)
    out = _randn(rows, columns + 5, dtype=out_dtype)
    expected = out.double()
    expected[:, :columns] = beta * expected[:, :columns] + a.double() @ b.double()
    if beta == 0:
        out[:, :columns] = math.nan
    wrapper.multiply_(a, b, out[:, :columns], beta)
    bound = BOUNDS[out_dtype] / (1 if out_dtype == dtype else 4)
    assert relative_error(out[:, :columns], expected[:, :columns]) <= bound
    assert torch.equal(out[:, columns:].double(), expected[:, columns:]), "outside the output"


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@BETA
@TRANSPOSED
def test_products(instruction_set: str, rows: int, inner: int, columns: int, beta: float, transposed: str) -> None:
    _check_product(rows, inner, columns, beta, transposed, torch.float32, torch.float32)


@needs_tiles
@OUT_TYPES
@pytest.mark.parametrize(("rows", "inner", "columns"), NARROW_SIZES)
@BETA
@TRANSPOSED
def test_products_of_bfloat16(
    rows: int, inner: int, columns: int, beta: float, transposed: str, out_dtype: torch.dtype
) -> None:
    _check_product(rows, inner, columns, beta, transposed, torch.bfloat16, out_dtype)


@needs_tiles
@OUT_TYPES
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("columns", [1024, 992, 1001])  # rows of the output that begin at a cache line, and that do not
def test_large_products_of_bfloat16_past_the_caches(columns: int, beta: float, out_dtype: torch.dtype) -> None:
    a, b = _randn(1100, 70, dtype=torch.bfloat16), _randn(70, columns, dtype=torch.bfloat16)
    out = _randn(1100, columns, dtype=out_dtype)
    expected = beta * out.double() + a.double() @ b.double()
    wrapper.multiply_(a, b, out, beta)
    assert relative_error(out, expected) <= (1e-6 if out_dtype == torch.float32 else 6e-3)


@needs_tiles
def test_operands_of_any_strides_and_no_others() -> None:
    wide, b, out = _randn(40, 100, dtype=torch.bfloat16), _randn(50, 8, dtype=torch.bfloat16), torch.empty(40, 8)
    spread, repeated = wide[:, ::2], torch.ones((), dtype=torch.bfloat16).expand(40, 50)
    row = _randn(8, 7, dtype=torch.bfloat16)[:, 2].unsqueeze(0)  # strides 56 and 7
    for a, other in ((spread, b), (repeated, b), (wide[:, :1], row), (wide[:, ::2], b.t().contiguous().t()[:, :8])):
        wrapper.multiply_(a, other, out, 0.0)
        assert relative_error(out, a.double() @ other.double()) <= 1e-6
    for a, other, place in ((wide, b, out), (spread, b, out[:39]), (spread, b, torch.empty(40, 9))):
        with pytest.raises(AssertionError):
            wrapper.multiply_(a, other, place, 0.0)
    sideways = torch.full((8, 40), math.nan).t()
    multiply_(spread, b, sideways, 0.0)
    assert relative_error(sideways, spread.double() @ b.double()) <= BOUNDS[torch.bfloat16]


@needs_tiles
def test_tile_registers_are_shared_with_torch() -> None:
    a, b = _randn(300, 200, dtype=torch.bfloat16), _randn(200, 300, dtype=torch.bfloat16)
    expected, out = a @ b, torch.empty(300, 300)  # oneDNN's, on the same registers
    for _ in range(3):
        wrapper.multiply_(a, b, out, 0.0)
        assert torch.equal(a @ b, expected) and relative_error(out, a.double() @ b.double()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_products_of_all_experts(instruction_set: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and instruction_set != "amx":
        pytest.skip("products of bfloat16 need AMX")
    counts = [0, 1, 7, 0, 127, 129, 400, 0]
    ends, rows = torch.tensor(counts).cumsum(0).to(torch.int32), sum(counts)
    weight, x, grad = _randn(8, 70, 40, dtype=dtype), _randn(rows, 40, dtype=dtype), _randn(rows, 70, dtype=dtype)
    for main_dtype in {torch.float32, dtype}:
        out = _randn(8, 70, 40, dtype=main_dtype)
        expected = out.double()
        wrapper.grouped_weight_gradient_(grad, x, ends, out, 1.0)
        for number, (g, r) in enumerate(zip(grad.double().split(counts), x.double().split(counts), strict=True)):
            expected[number] += g.T @ r
        assert relative_error(out, expected) <= BOUNDS[dtype]
    y, dx = (wrapper.grouped_product(part, weight, ends, part is x, "auto") for part in (x, grad))
    pairs = list(zip(weight.double(), x.double().split(counts), grad.double().split(counts), strict=True))
    assert relative_error(y, torch.cat([r @ w.T for w, r, _ in pairs])) <= BOUNDS[dtype]
    assert relative_error(dx, torch.cat([g @ w for w, _, g in pairs])) <= BOUNDS[dtype]
