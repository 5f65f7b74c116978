"""Blends of data sets, and the train, validation and test data sets that a configuration asks for."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets.gpt_dataset import Dataset, GPTDataset, MockGPTDataset, Sample, SampleFormat, count_tokens
from megatron.core.datasets.helpers import build_blending_indices
from megatron.core.datasets.index_cache import cached_arrays
from megatron.core.datasets.indexed_dataset import IndexedDataset

if TYPE_CHECKING:
    from megatron.core.config import DataConfig

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_CHECKED_TOKENS = 1 << 16


class Vocabulary(Protocol):
    """What data sets need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...


class BlendRow(NamedTuple):
    """What a run takes from one data set of a blend."""

    prefix: str
    weight: float
    """Share of the samples, of 1."""
    tokens: int
    """Tokens of the data set in this split."""
    epochs: float
    """How often the run reads each of them."""


class BlendedDataset:
    """Samples of several data sets in fixed shares, mixed evenly: any stretch of n samples has weight * n of each.

    `source` (int16) and `within` (int64), both [samples], name each sample's data set and number in it.
    """

    def __init__(self, datasets: Sequence[Dataset], source: NDArray[np.int16], within: NDArray[np.int64]) -> None:
        assert len(source) == len(within), (len(source), len(within))
        self.datasets, self.source, self.within = list(datasets), source, within

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.source):
            raise IndexError(f"sample {index} of {len(self.source)}")
        return self.datasets[int(self.source[index])][int(self.within[index])]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_shares(flag: str, shares: Sequence[float], text: str) -> None:
    for share in shares:
        if not math.isfinite(share) or share < 0:
            raise ValueError(f"{flag} {text}: {share} is no weight; weights are finite numbers that are not negative")
    if not sum(shares) > 0:
        raise ValueError(f"{flag} {text}: at least one weight must be above 0")


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, validation and test that sum to 1, from "969,30,1"; missing ones are 0."""
    shares = [_number(part) for part in split.split(",")]
    numbers = [share for share in shares if share is not None]
    if len(numbers) < len(shares) or len(shares) > len(SPLITS):
        raise ValueError(f"--split {split!r} must be up to three numbers separated by commas, for example 969,30,1")
    _check_shares("--split", numbers, split)
    train, valid, test = [*(share / sum(numbers) for share in numbers), 0.0, 0.0][:3]
    return train, valid, test


def split_documents(document_count: int, split: tuple[float, float, float]) -> list[tuple[int, int]]:
    """Document ranges `[start, stop)` of train, validation and test; small shares of few documents may be empty."""
    train, valid, _ = split
    bounds = [0, round(train * document_count), round((train + valid) * document_count), document_count]
    return list(pairwise(bounds))


def parse_blend(data_path: Sequence[str]) -> list[tuple[float | None, str]]:
    """(weight, prefix) pairs from `--data-path`, weights summing to 1; None throughout if it has only prefixes.

    Without weights every data set is taken in proportion to its tokens in the split, so that all of them are read
    equally often. Raises ValueError for a list that mixes the two forms, and for weights that are negative, not
    finite or all zero.
    """
    text = " ".join(data_path)
    if not any(_number(part) is not None for part in data_path):
        return [(None, prefix) for prefix in data_path]
    weights = [_number(part) for part in data_path[::2]]
    prefixes = list(data_path[1::2])
    numbers = [weight for weight in weights if weight is not None]
    if len(data_path) % 2 or len(numbers) < len(weights) or any(_number(prefix) is not None for prefix in prefixes):
        raise ValueError(
            f"--data-path {text}: give a weight before every data set or before none, for example "
            "0.6 a_text_document 0.4 b_text_document"
        )
    _check_shares("--data-path", numbers, text)
    return [(weight / sum(numbers), prefix) for weight, prefix in zip(numbers, prefixes)]


def _open(prefix: str, vocab_size: int) -> IndexedDataset:
    """Open a data set and check what can be checked without reading all of it against the vocabulary."""
    indexed = IndexedDataset(prefix.removesuffix(".bin").removesuffix(".idx"))
    if indexed.dtype.kind not in "iu":
        raise ValueError(f"{indexed.prefix}.idx: tokens of type {indexed.dtype.name} cannot be trained on")
    for block in indexed.token_blocks(_CHECKED_TOKENS):
        if len(block) and not 0 <= block.min() <= block.max() < vocab_size:
            raise ValueError(
                f"{indexed.prefix}.bin has token ids up to {block.max()}, outside the vocabulary of {vocab_size}: it "
                "was made with another tokenizer; run tools/preprocess_data.py with the one you train with"
            )
    return indexed


def _sample_format(config: DataConfig, tokenizer: Vocabulary) -> SampleFormat:
    return SampleFormat(
        eod_token=tokenizer.eod,
        eod_mask_loss=config.eod_mask_loss,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
    )


class _Builder:
    """Builds the data set of one split after the other from opened data sets."""

    def __init__(self, config: DataConfig, seed: int, tokenizer: Vocabulary) -> None:
        blend = parse_blend(config.data_path)
        prefixes = [prefix.removesuffix(".bin").removesuffix(".idx") for _, prefix in blend]
        twice = next((prefix for prefix in prefixes if prefixes.count(prefix) > 1), None)
        if twice is not None:
            raise ValueError(f"--data-path names {twice} twice: name it once, with the sum of its weights")
        opened = {prefix: _open(prefix, tokenizer.vocab_size) for prefix in {prefix for _, prefix in blend}}
        self._sources = [(weight, opened[prefix]) for weight, prefix in blend]
        self._config, self._seed, self._tokenizer = config, seed, tokenizer
        self._format = _sample_format(config, tokenizer)
        self._split = parse_split(config.split)
        self._cache: str | os.PathLike[str] = (
            config.data_cache_path or Path(self._sources[0][1].prefix).absolute().parent / "cache"
        )

    def build(self, which: int, num_samples: int) -> Dataset | None:
        """The data set of split number `which`, or None if the split has no share, no documents or no samples."""
        if num_samples == 0 or self._split[which] == 0:
            return None
        weights, parts = [], []
        for weight, indexed in self._sources:
            documents = split_documents(indexed.document_count, self._split)[which]
            tokens = count_tokens(indexed, documents)
            if tokens and weight != 0:
                weights.append(tokens if weight is None else weight)
                parts.append((indexed, documents))
            elif weight != 0:
                logger.warning("%s has no documents for the %s split: left out of it", indexed.prefix, SPLITS[which])
        if not parts:
            return None
        if len(parts) == 1:
            return self._dataset(*parts[0], which, num_samples)
        shares = np.array(weights, np.float64) / math.fsum(weights)
        description = {"format": 1, "weights": shares.tolist(), "num_samples": num_samples}
        arrays = cached_arrays(
            self._cache,
            description,
            lambda: dict(zip(("source", "within"), build_blending_indices(shares, num_samples))),
        )
        counts = np.bincount(arrays["source"], minlength=len(parts))
        # A data set that is too rare for this many samples still needs one, which nobody reads.
        datasets = [self._dataset(*part, which, max(int(count), 1)) for part, count in zip(parts, counts)]
        return BlendedDataset(datasets, arrays["source"], arrays["within"])

    def _dataset(self, indexed: IndexedDataset, documents: tuple[int, int], which: int, num_samples: int) -> GPTDataset:
        return GPTDataset(
            indexed,
            documents,
            num_samples,
            self._config.seq_length,
            self._seed,
            SPLITS[which],
            self._cache,
            self._format,
            self._tokenizer.vocab_size,
        )


def build_train_valid_test_datasets(
    config: DataConfig, num_samples: tuple[int, int, int], seed: int, tokenizer: Vocabulary
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Data sets of `num_samples` training, validation and test samples.

    One is None where its number of samples or its share of the split is 0, or where the split leaves it no
    documents (for training that is an error). Any number of processes may build at once; the first to finish leaves
    the indices to the others in the cache folder. Raises ValueError or FileNotFoundError, naming file or flag.
    """
    assert min(num_samples) >= 0, num_samples
    if config.mock_data:
        sample_format = _sample_format(config, tokenizer)
        mock = [
            MockGPTDataset(tokenizer.vocab_size, config.seq_length, count, len(SPLITS) * seed + which, sample_format)
            if count
            else None
            for which, count in enumerate(num_samples)
        ]
        return mock[0], mock[1], mock[2]
    if not config.data_path:
        raise ValueError("no data: give --data-path the prefix of a data set, or --mock-data")
    builder = _Builder(config, seed, tokenizer)
    train, valid, test = (builder.build(which, count) for which, count in enumerate(num_samples))
    if train is None and num_samples[0]:
        raise ValueError(
            f"--split {config.split} leaves no documents of {' '.join(config.data_path)} for training: give it a "
            "larger first share or more documents"
        )
    return train, valid, test


def blend_summary(dataset: Dataset | None) -> list[BlendRow]:
    """What a data set of `build_train_valid_test_datasets` takes from each of its sources; empty for mock data."""
    if isinstance(dataset, GPTDataset):
        parts, counts = [dataset], [len(dataset)]
    elif isinstance(dataset, BlendedDataset):
        parts = [part for part in dataset.datasets if isinstance(part, GPTDataset)]
        counts = np.bincount(dataset.source, minlength=len(parts)).tolist()
    else:
        return []
    return [
        BlendRow(
            part.indexed.prefix,
            count / sum(counts),
            part.tokens_per_epoch,
            count * part.seq_length / part.tokens_per_epoch,
        )
        for part, count in zip(parts, counts)
    ]
