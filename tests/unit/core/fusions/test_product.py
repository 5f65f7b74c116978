"""Products into given tensors, and the blocks that wide ones are cut into."""

import pytest
import torch
from megatron.core.fusions.product import ALIGNED, blocks, multiply


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
    multiply(torch.empty(3, 0, dtype=dtype), torch.empty(0, 5, dtype=dtype), out, beta)
    assert torch.equal(out, torch.full((3, 5), 4.0 * beta))
