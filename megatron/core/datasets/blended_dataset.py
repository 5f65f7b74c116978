"""Blends of data sets, and the train, validation and test data sets that a configuration asks for."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron.core.datasets.blend import SPLITS, BlendOrder, SplitBlend, split_blends
from megatron.core.datasets.description import description_path, read_description
from megatron.core.datasets.gpt_dataset import Dataset, GPTDataset, MockGPTDataset, Sample, SampleFormat
from megatron.core.datasets.index_cache import remove_leftovers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.text_files import shortened

if TYPE_CHECKING:
    from megatron.core.config import DataConfig

logger = logging.getLogger(__name__)

_CHECKED_TOKENS = 1 << 16


class Vocabulary(Protocol):
    """What data sets need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...


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
    """`num_samples` samples of several data sets in fixed shares, evenly mixed (see `BlendOrder`)."""

    def __init__(self, datasets: Sequence[Dataset], order: BlendOrder, num_samples: int) -> None:
        self.datasets, self.order, self._num_samples = list(datasets), order, num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        source, within = self.order.locate(index)
        return self.datasets[source][within]


def _open(prefix: str, vocabulary: Vocabulary | None) -> IndexedDataset:
    """Open a data set and check, as far as can be seen without reading all, that it was made for the vocabulary."""
    indexed = IndexedDataset(prefix, random_access=True)
    if indexed.dtype.kind not in "iu":
        raise ValueError(f"{prefix}.idx: tokens of type {indexed.dtype.name} cannot be trained on")
    if vocabulary is None:
        return indexed
    _check_description(indexed, vocabulary)
    for block in indexed.token_blocks(_CHECKED_TOKENS):
        if len(block) and not 0 <= block.min() <= block.max() < vocabulary.vocab_size:
            raise ValueError(
                f"{prefix}.bin has token ids up to {block.max()}, outside the vocabulary of {vocabulary.vocab_size}: "
                "it was made with another tokenizer; run tools/preprocess_data.py with the one you train with"
            )
    return indexed


def _check_description(indexed: IndexedDataset, vocabulary: Vocabulary) -> None:
    """Raises ValueError if the JSON file of a data set does not describe it."""
    description, path = read_description(indexed.prefix), description_path(indexed.prefix)
    if description is None:
        _warn_of_no_description(str(path))
        return
    found = (indexed.document_count, indexed.token_count, indexed.dtype.name)
    stated = (description.documents, description.tokens, description.dtype)
    if found != stated:
        raise ValueError(
            f"{path} describes {stated[0]} documents of {stated[1]} {stated[2]} tokens, but the data set has "
            f"{found[0]} of {found[1]} {found[2]}: they do not belong together; run tools/preprocess_data.py again"
        )
    differences = description.tokenizer_differences(vocabulary.identity)
    if differences:
        raise ValueError(
            f"{indexed.prefix} was made with another tokenizer than this run's: {'; '.join(differences)}. Train with "
            f"the tokenizer of the data, or run tools/preprocess_data.py with this one (if you know that their ids "
            f"mean the same, remove {path})"
        )


@functools.cache  # data sets are opened more than once, and once is enough to say it
def _warn_of_no_description(path: str) -> None:
    logger.warning("%s does not exist: whether the data were made with this run's tokenizer cannot be checked", path)


class _Builder:
    """Builds the data set of one split after the other from data sets that it opens once."""

    def __init__(self, config: DataConfig, seed: int, vocabulary: Vocabulary | None) -> None:
        self.blends = split_blends(config)
        sources = [source for blend in self.blends if blend is not None for source in blend.sources]
        self._opened = {source.prefix: _open(source.prefix, vocabulary) for source in sources}
        self._config, self._seed = config, seed
        self._vocab_size = None if vocabulary is None else vocabulary.vocab_size
        self._format = _sample_format(config, vocabulary)
        self._cache: str | os.PathLike[str] = (
            config.data_cache_path or Path(sources[0].prefix).absolute().parent / "cache"
        )
        remove_leftovers(self._cache)

    def build(self, which: int, num_samples: int) -> Dataset | None:
        """The data set of split number `which`, or None if it has no data, no documents or no samples."""
        blend = self.blends[which]
        if blend is None or num_samples == 0:
            return None
        parts, weights = self._parts(which, blend)
        if not parts:
            return None
        if len(parts) == 1:
            return self._dataset(*parts[0], which, num_samples)
        order = BlendOrder(weights)
        counts = order.counts(num_samples)
        # A data set that is too rare for this many samples still needs one, which is never read.
        datasets = [self._dataset(*part, which, max(count, 1)) for part, count in zip(parts, counts)]
        return BlendedDataset(datasets, order, num_samples)

    def _parts(self, which: int, blend: SplitBlend) -> tuple[list[tuple[IndexedDataset, tuple[int, int]]], list[float]]:
        """The data sets that have documents in the split, these documents, and the data sets' weights."""
        parts, weights = [], []
        for source in blend.sources:
            indexed = self._opened[source.prefix]
            documents = blend.documents(indexed.document_count)
            tokens = indexed.count_tokens(*documents)
            if tokens and source.weight != 0:
                weights.append(tokens if source.weight is None else source.weight)
                parts.append((indexed, documents))
            elif source.weight != 0:
                logger.warning(
                    "%s has no documents for the %s split, which gets %g%% of its %d: it is left out of that split "
                    "(a larger share in --split brings it in)",
                    source.prefix, SPLITS[which], 100 * (blend.stop - blend.start), indexed.document_count,
                )  # fmt: skip
        return parts, [weight / math.fsum(weights) for weight in weights]

    def _dataset(self, indexed: IndexedDataset, documents: tuple[int, int], which: int, num_samples: int) -> GPTDataset:
        return GPTDataset(
            indexed, documents, num_samples, self._config.seq_length, self._seed, SPLITS[which], self._cache,
            self._format, self._vocab_size,
        )  # fmt: skip


def _sample_format(config: DataConfig, vocabulary: Vocabulary | None) -> SampleFormat:
    return SampleFormat(
        eod_token=None if vocabulary is None else vocabulary.eod,
        eod_mask_loss=config.eod_mask_loss,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
    )


def build_train_valid_test_datasets(
    config: DataConfig, num_samples: tuple[int, int, int], seed: int, vocabulary: Vocabulary | None
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Data sets of `num_samples` training, validation and test samples.

    One is None where its number of samples or its share of the split is 0, or where the split leaves it no
    documents (for training that is an error). Any number of processes may build at once; the first to finish leaves
    the indices to the others in the cache folder. Without a `vocabulary` they can be built, but not checked against it.
    Raises ValueError or FileNotFoundError, naming file or flag.
    """
    assert min(num_samples) >= 0, num_samples
    if config.mock_data:
        assert vocabulary is not None, "mock data needs a vocabulary"
        size, sample_format = vocabulary.vocab_size, _sample_format(config, vocabulary)
        mock = [
            MockGPTDataset(size, config.seq_length, count, len(SPLITS) * seed + which, sample_format) if count else None
            for which, count in enumerate(num_samples)
        ]
        return mock[0], mock[1], mock[2]
    builder = _Builder(config, seed, vocabulary)
    train, valid, test = (builder.build(which, count) for which, count in enumerate(num_samples))
    if train is None and num_samples[0]:
        if builder.blends[0] is None:
            raise ValueError("the data flags name no data set for training: add one, or give --data-path")
        named = shortened(" ".join(source.prefix for source in builder.blends[0].sources))
        raise ValueError(f"no documents of {named} for training: give it a larger share of --split or more documents")
    return train, valid, test


def _parts_of(dataset: Dataset | None) -> list[tuple[GPTDataset, int]]:
    """The data sets that samples come from, and how many of them; none for mock data."""
    if isinstance(dataset, GPTDataset):
        return [(dataset, len(dataset))]
    if isinstance(dataset, BlendedDataset):
        counts = dataset.order.counts(len(dataset))
        return [(part, n) for part, n in zip(dataset.datasets, counts) if isinstance(part, GPTDataset)]
    return []


def blend_summary(dataset: Dataset | None) -> list[BlendRow]:
    """What a data set of `build_train_valid_test_datasets` takes from each of its sources; empty for mock data."""
    return [
        BlendRow(
            part.indexed.prefix,
            count / len(dataset) if dataset is not None else 0.0,
            part.tokens_per_epoch,
            count * part.seq_length / part.tokens_per_epoch,
        )
        for part, count in _parts_of(dataset)
    ]


def source_table(rows: Sequence[BlendRow]) -> str:
    """A line for every source, under a header."""
    width = max(len("source"), *(len(row.prefix) for row in rows))
    lines = [f"  {'source':{width}}  {'weight':>8}  {'tokens':>19}  {'epochs':>9}"]
    lines += [f"  {row.prefix:{width}}  {row.weight:8.2%}  {row.tokens:19,}  {row.epochs:9.2f}" for row in rows]
    return "\n".join(lines)


def fingerprints(dataset: Dataset | None) -> dict[str, str]:
    """What is in the files of a data set's sources, by absolute path without suffix; see `IndexedDataset.fingerprint`.

    The checksum that a source's description states for its `.bin` is there too, by the description's path.
    """
    found = {}
    for part, _ in _parts_of(dataset):
        prefix = os.path.abspath(part.indexed.prefix)
        found[prefix] = part.indexed.fingerprint
        description = read_description(prefix)
        if description is not None:
            found[str(description_path(prefix))] = str(description.sha256.get("bin"))
    return found
