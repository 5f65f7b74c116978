"""Index builders of the GPT and blended data sets: C++ where it was built, else NumPy, with the same results."""

import importlib
import logging
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

helpers_cpp: ModuleType | None
try:
    helpers_cpp = importlib.import_module("megatron.core.datasets.helpers_cpp")
except ImportError:
    helpers_cpp = None


def build_sample_index(
    sequence_lengths: NDArray[np.int32],
    document_index: NDArray[np.int32],
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
) -> NDArray:
    """Where each sample begins in the documents laid end to end in the order of `document_index`.

    Row i of the result, int32 (int64 from 2^31 documents on) of shape [samples + 1, 2], is (position in
    `document_index`, offset in that document) of token `i * seq_length`; a sample runs from its row to the next
    row's token inclusive, so that neighbours share one token. samples = (num_epochs * tokens_per_epoch - 1) //
    seq_length.
    """
    assert seq_length > 0 and num_epochs > 0 and tokens_per_epoch > 0, (seq_length, num_epochs, tokens_per_epoch)
    lengths = np.require(sequence_lengths, np.int32, ["C", "A"])
    documents = np.require(document_index, np.int32, ["C", "A"])
    build = helpers_cpp.build_sample_index if helpers_cpp else build_sample_index_numpy
    return build(lengths, documents, seq_length, num_epochs, tokens_per_epoch)


def build_sample_index_numpy(
    sequence_lengths: NDArray[np.int32],
    document_index: NDArray[np.int32],
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
) -> NDArray:
    """The NumPy twin of `build_sample_index`."""
    samples = (num_epochs * tokens_per_epoch - 1) // seq_length
    ends = np.cumsum(sequence_lengths[document_index], dtype=np.int64)
    tokens = np.arange(samples + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, tokens, side="right")
    if positions[-1] >= len(ends):
        raise ValueError("the documents hold fewer tokens than num_epochs * tokens_per_epoch")
    starts = ends[positions] - sequence_lengths[document_index[positions]]
    dtype = np.int64 if len(document_index) > np.iinfo(np.int32).max else np.int32
    return np.stack([positions, tokens - starts], axis=1).astype(dtype)


def build_blending_indices(
    weights: NDArray[np.float64], num_samples: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Which data set each sample of a blend comes from, and which of that data set's samples it is.

    After any number n of samples every data set has been chosen between weight * n - 1 and weight * n + 1 times, and
    the choice does not depend on `num_samples`: among the data sets that may take a sample without getting ahead of
    their weight, the one whose next sample falls due first takes it (pfair scheduling, Baruah et al. 1996).
    `weights` is positive and sums to one. Returns int16 and int64 arrays of `num_samples`.
    """
    weights = np.require(weights, np.float64, ["C", "A"])
    assert abs(weights.sum() - 1) < 1e-9 and weights.min() > 0, weights
    if len(weights) > np.iinfo(np.int16).max:
        raise ValueError(f"a blend takes at most {np.iinfo(np.int16).max} data sets, got {len(weights)}")
    if helpers_cpp is None and num_samples > 1_000_000:
        logger.warning("the C++ helper was not built, so that this blend takes minutes: reinstall with a compiler")
    build = helpers_cpp.build_blending_indices if helpers_cpp else build_blending_indices_numpy
    return build(weights, num_samples)


def build_blending_indices_numpy(
    weights: NDArray[np.float64], num_samples: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The NumPy twin of `build_blending_indices`."""
    source_of_sample = np.empty(num_samples, np.int16)
    sample_of_source = np.empty(num_samples, np.int64)
    counts = np.zeros(len(weights), np.int64)
    for sample in range(num_samples):
        deadlines = np.where(counts < weights * (sample + 1), (counts + 1) / weights, np.inf)
        best = int(np.argmin(deadlines))
        source_of_sample[sample], sample_of_source[sample] = best, counts[best]
        counts[best] += 1
    return source_of_sample, sample_of_source
