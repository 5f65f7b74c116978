"""Attention within documents equals the formula with a dense mask, and no document sees another."""

import itertools

import pytest
import torch
from torch import Tensor

from megatron.core.fusions.attention import Documents, causal_attention
from megatron.core.fusions.kernels.library import packed

# samples of 12 tokens: a whole document, single tokens, and documents that fill a sample
LENGTHS = [(12, 12), (5, 7, 12), (1, 1, 10, 3, 8, 1), (4, 4, 4, 11, 1)]


def documents_of(lengths: tuple[int, ...]) -> Documents:
    bounds = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)
    return Documents.from_bounds(bounds, torch.device("cpu"))


def inputs(heads: int = 4, groups: int = 2, batch: int = 2, sequence: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, sequence, 6)] + 2 * [(batch, groups, sequence, 6)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v with an explicit mask."""
    batch, heads, sequence, width = query.shape
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(batch, 1, sequence)
    seen = (document.mT == document) & torch.ones(sequence, sequence).tril().bool()
    scores = (query @ key.mT / width**0.5).masked_fill(~seen.unsqueeze(1), -torch.inf)
    return scores.softmax(dim=-1) @ value


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_documents_equal_a_dense_mask(lengths: tuple[int, ...], groups: int) -> None:
    ours, theirs = inputs(groups=groups), inputs(groups=groups)
    output, expected = causal_attention(*ours, documents_of(lengths)), dense(*theirs, lengths)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_whole_samples_are_documents_of_their_length() -> None:
    parts = inputs()
    torch.testing.assert_close(
        causal_attention(*parts), causal_attention(*parts, documents_of((12, 12))), rtol=0, atol=0
    )


def test_the_variable_length_kernel_gets_what_it_is_documented_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the CUDA kernel: documents of a packed [tokens, heads, d], found by their cumulative lengths."""
    lengths = LENGTHS[2]
    for grouped in (True, False):

        def varlen(query, key, value, bounds, bounds_k, longest, longest_k, *, window_size, enable_gqa=False):
            assert bounds is bounds_k and bounds.dtype == torch.int32 and longest == longest_k == max(lengths)
            assert window_size == (-1, 0) and enable_gqa == grouped  # noqa: B023
            assert query.shape == (24, 4, 6) and key.shape == value.shape == (24, 2 if enable_gqa else 4, 6)
            pieces = [
                causal_attention(*(part[a:b].transpose(0, 1).unsqueeze(0) for part in (query, key, value)))
                for a, b in itertools.pairwise(bounds.tolist())
            ]
            return torch.cat([piece.squeeze(0).transpose(0, 1) for piece in pieces])

        monkeypatch.setattr(packed, "varlen_attn", varlen)
        monkeypatch.setattr(packed, "_VARLEN_GROUPS", grouped)
        parts = inputs()
        operands = [part.transpose(1, 2).flatten(0, 1) for part in parts]
        output = packed.attend_documents(*operands, documents_of(lengths).bounds, lengths)
        output = output.view(2, 12, 4, 6).transpose(1, 2)
        torch.testing.assert_close(output, dense(*parts, lengths), rtol=1e-12, atol=1e-12)
