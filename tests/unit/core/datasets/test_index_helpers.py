"""Where samples begin: the C++ build equals the NumPy twin, and both equal the definition."""

import numpy as np
import pytest

from megatron.core.datasets import helpers

needs_extension = pytest.mark.skipif(helpers.helpers_cpp is None, reason="the C++ helper is not built")
BUILDS = [helpers.sample_starts, helpers.sample_starts_numpy]


def random_case(case: int) -> tuple[np.ndarray, np.ndarray, int, int, int]:
    random = np.random.default_rng(case)
    count = int(random.integers(1, 20))
    longest = [1, 3, 50][case % 3]
    lengths = random.integers(0 if case % 2 else 1, longest + 1, count).astype(np.int32)
    lengths[random.integers(count)] += 1
    tokens = int(lengths.sum())
    seq_length = int(random.integers(1, 2 * tokens + 2))
    order = random.permutation(count).astype(np.int32)
    return lengths, order, seq_length, int(random.integers(seq_length)), tokens


CASES = [
    *(random_case(case) for case in range(300)),
    (np.array([5], np.int32), np.zeros(1, np.int32), 4, 0, 5),  # a sample and the beginning of the next
    (np.array([4], np.int32), np.zeros(1, np.int32), 4, 0, 4),  # exactly one
    (np.array([4], np.int32), np.zeros(1, np.int32), 9, 7, 4),  # none begins here
    (np.array([4, 0, 0, 4, 0], np.int32), np.array([1, 0, 2, 3, 4], np.int32), 4, 0, 8),
]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("block", [1 << 22, 3])
def test_rows_are_the_places_of_every_seq_lengths_token(build, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "_BLOCK", block)
    for lengths, order, seq_length, first, tokens in CASES:
        places = [(position, offset) for position, d in enumerate(order) for offset in range(lengths[d])]
        rows = build(lengths, order, seq_length, first, tokens)
        assert rows.dtype == np.int32
        assert [tuple(row) for row in rows.tolist()] == places[first::seq_length]


@needs_extension
def test_the_extension_equals_its_twin_and_is_what_is_used() -> None:
    assert helpers.helpers_cpp is not None
    for case in CASES:
        built = helpers.helpers_cpp.sample_starts(*case)
        twin = helpers.sample_starts_numpy(*case)
        assert built.dtype == twin.dtype and np.array_equal(built, twin)


def test_more_documents_than_an_int32_names_are_left_to_numpy() -> None:
    rows = helpers.sample_starts(np.array([3, 4], np.int32), np.arange(2, dtype=np.int64), 2, 1, 7)
    assert rows.dtype == np.int64 and rows.tolist() == [[0, 1], [1, 0], [1, 2]]


@pytest.mark.parametrize("build", BUILDS)
def test_too_few_tokens_are_refused(build) -> None:
    with pytest.raises(ValueError, match="hold 3 tokens, fewer than 6"):
        build(np.array([3], np.int32), np.zeros(1, np.int32), 2, 0, 6)


@needs_extension
def test_a_document_without_a_length_is_refused() -> None:
    for document in (-1, 2):
        with pytest.raises(ValueError, match="no length"):
            helpers.sample_starts(np.ones(2, np.int32), np.array([0, document], np.int32), 2, 0, 2)


def test_lengths_in_the_middle_of_an_index_file_are_taken() -> None:
    """The lengths in .idx begin at byte 34, which C++ must not read as aligned integers."""
    raw = np.frombuffer(bytes(34) + np.array([3, 4], "<i4").tobytes(), np.uint8)
    lengths = raw[34:].view("<i4")
    rows = helpers.sample_starts(lengths, np.arange(2, dtype=np.int32), 2, 0, 7)
    assert rows.tolist() == [[0, 0], [0, 2], [1, 1], [1, 3]]
