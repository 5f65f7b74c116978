"""Sample and blending indices: the C++ build equals the NumPy twin, and both equal their definitions."""

import numpy as np
import pytest

from megatron.core.datasets import helpers

needs_extension = pytest.mark.skipif(helpers.helpers_cpp is None, reason="the C++ helper is not built")


def random_case(case: int) -> tuple[np.ndarray, np.ndarray, int, int, int]:
    random = np.random.default_rng(case)
    count = int(random.integers(1, 20))
    longest = [1, 3, 50][case % 3]
    lengths = random.integers(0 if case % 2 else 1, longest + 1, count).astype(np.int32)
    lengths[random.integers(count)] += 1
    epochs = int(random.integers(1, 5))
    documents = np.concatenate([random.permutation(count) for _ in range(epochs)]).astype(np.int32)
    tokens = int(lengths.sum())
    return lengths, documents, int(random.integers(1, 2 * tokens + 2)), epochs, tokens


CASES = [
    *(random_case(case) for case in range(300)),
    (np.array([1], np.int32), np.zeros(7, np.int32), 2, 7, 1),
    (np.array([5], np.int32), np.zeros(1, np.int32), 4, 1, 5),  # exactly one sample of one document
    (np.ones(9, np.int32), np.arange(9, dtype=np.int32), 1, 1, 9),
    (np.array([4, 0, 0, 4], np.int32), np.array([1, 0, 2, 3], np.int32), 4, 1, 8),
]


@pytest.mark.parametrize("build", [helpers.build_sample_index, helpers.build_sample_index_numpy])
def test_rows_are_the_places_of_every_seq_lengths_token(build) -> None:
    for lengths, documents, seq_length, epochs, tokens in CASES:
        places = [(position, offset) for position, d in enumerate(documents) for offset in range(lengths[d])]
        samples = (epochs * tokens - 1) // seq_length
        expected = [places[i * seq_length] for i in range(samples + 1)]
        rows = build(lengths, documents, seq_length, epochs, tokens)
        assert rows.dtype == np.int32 and rows.shape == (samples + 1, 2)
        assert [tuple(row) for row in rows.tolist()] == expected


@needs_extension
def test_the_extension_equals_its_twin() -> None:
    assert helpers.helpers_cpp is not None
    for case in CASES:
        built = helpers.helpers_cpp.build_sample_index(*case)
        twin = helpers.build_sample_index_numpy(*case)
        assert built.dtype == twin.dtype and np.array_equal(built, twin)


@pytest.mark.parametrize("build", [helpers.build_sample_index, helpers.build_sample_index_numpy])
def test_too_few_tokens_are_refused(build) -> None:
    with pytest.raises(ValueError, match="fewer tokens"):
        build(np.array([3], np.int32), np.zeros(1, np.int32), 2, 2, 3)


def test_lengths_in_the_middle_of_an_index_file_are_taken() -> None:
    """The lengths in .idx begin at byte 34, which C++ must not read as aligned integers."""
    raw = np.frombuffer(bytes(34) + np.array([3, 4], "<i4").tobytes(), np.uint8)
    lengths = raw[34:].view("<i4")
    assert helpers.build_sample_index(lengths, np.arange(2, dtype=np.int32), 2, 1, 7).tolist() == [
        [0, 0], [0, 2], [1, 1], [1, 3],
    ]  # fmt: skip


def blends() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    cases = [
        np.array(w, float) for w in ([1], [0.6, 0.4], [1, 1, 1], [0.9, 0.05, 0.05], [0.5, *[0.01] * 50], [1, 1e-6])
    ]
    # On one of these, always taking the data set furthest behind lets one fall behind by more than one sample.
    cases += [random.dirichlet(np.full(int(random.integers(2, 30)), 0.3)) + 1e-9 for _ in range(30)]
    cases += [1.0 / np.arange(1, 41), 2.0 ** -np.arange(12)]
    return [weights / weights.sum() for weights in cases]


@pytest.mark.parametrize("build", [helpers.build_blending_indices, helpers.build_blending_indices_numpy])
def test_counts_are_within_one_of_the_weights_after_every_sample(build) -> None:
    for weights in blends():
        source, within = build(weights, 700)
        assert source.dtype == np.int16 and within.dtype == np.int64
        chosen = np.eye(len(weights))[source]
        counts = np.cumsum(chosen, axis=0)
        assert np.abs(counts - weights * np.arange(1, 701)[:, None]).max() <= 1 + 1e-9
        assert np.array_equal(within, counts[np.arange(700), source] - 1)


@needs_extension
def test_blends_of_the_extension_equal_its_twin() -> None:
    assert helpers.helpers_cpp is not None
    for weights in blends():
        built = helpers.helpers_cpp.build_blending_indices(weights, 500)
        twin = helpers.build_blending_indices_numpy(weights, 500)
        assert [array.dtype for array in built] == [array.dtype for array in twin]
        assert np.array_equal(built[0], twin[0]) and np.array_equal(built[1], twin[1])


def test_a_longer_blend_begins_with_the_shorter_one() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    short, long = (helpers.build_blending_indices(weights, count) for count in (50, 500))
    assert np.array_equal(short[0], long[0][:50]) and np.array_equal(short[1], long[1][:50])


def test_more_data_sets_than_the_index_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match="32767"):
        helpers.build_blending_indices(np.full(40000, 1 / 40000), 1)
