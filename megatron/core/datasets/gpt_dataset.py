"""Training samples cut from the documents of an indexed data set."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets.helpers import sample_starts, smallest_integer
from megatron.core.datasets.index_cache import ArrayType, Put, cached_arrays
from megatron.core.datasets.indexed_dataset import IndexedDataset

Sample = dict[str, NDArray]

_DOCUMENTS, _SAMPLES = 0, 1
# Beyond this the indices of a tiny data set would take minutes to build, which is never meant.
_MOST_EPOCHS = 100_000


class Dataset(Protocol):
    """A map-style data set of samples, as `make_sample` describes them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class SampleFormat:
    """What a sample says about the documents in it."""

    eod_token: int | None = None
    """Token that ends a document."""
    eod_mask_loss: bool = False
    """Take no loss where the input is `eod_token`, since what follows is unrelated."""
    reset_position_ids: bool = False
    """Count positions from 0 in each document, as `position_ids`."""
    reset_attention_mask: bool = False
    """Give the `document_lengths`, so that documents can be kept from seeing each other."""

    def __post_init__(self) -> None:
        assert not (self.eod_mask_loss and self.eod_token is None), "eod_mask_loss needs eod_token"


def make_sample(tokens: NDArray, format: SampleFormat, stored_lengths: Sequence[int] = ()) -> Sample:
    """A sample from S + 1 consecutive tokens, cut from stored documents of `stored_lengths` tokens.

    `tokens` int64 [S], `labels` int64 [S] (the tokens that follow them), `loss_mask` float32 [S]; if the format asks
    for them, `position_ids` int64 [S] and `document_lengths` int32 [documents], which sum to S. A document ends where
    the stored one ends, and after an EOD within it.
    """
    tokens = tokens.astype(np.int64)
    inputs, labels = tokens[:-1], tokens[1:]
    loss_mask = np.ones(len(inputs), np.float32)
    if format.eod_mask_loss:
        loss_mask[inputs == format.eod_token] = 0
    sample: Sample = {"tokens": inputs, "labels": labels, "loss_mask": loss_mask}
    if format.reset_position_ids or format.reset_attention_mask:
        begins = np.zeros(len(tokens), bool)
        begins[np.cumsum([0, *stored_lengths])[: len(stored_lengths)]] = True
        begins[0] = True
        if format.eod_token is not None:
            begins[1:] |= inputs == format.eod_token
        starts = np.flatnonzero(begins[:-1])
        lengths = np.diff(starts, append=len(inputs))
        if format.reset_position_ids:
            sample["position_ids"] = np.arange(len(inputs)) - np.repeat(starts, lengths)
        if format.reset_attention_mask:
            sample["document_lengths"] = lengths.astype(np.int32)
    return sample


def _shuffled(count: int, start: int, seed: int, epoch: int, purpose: int) -> NDArray[np.integer]:
    # RandomState, unlike Generator, promises the same stream in every version of NumPy.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch, purpose])))
    numbers = np.arange(start, start + count, dtype=smallest_integer(start + count))
    random.shuffle(numbers)
    return numbers


class GPTDataset:
    """`num_samples` samples of `seq_length` tokens from a range of documents, over as many epochs as they take.

    In each epoch the documents are shuffled and appended to those of the epoch before; the stream is cut
    into samples that share one token with their neighbours, and the samples that end within an epoch are shuffled
    among themselves. So every epoch, the last and partial one too, is shuffled apart from the others, every token of
    an epoch is seen before the next begins (but for the sample across the edge), and sample k depends on the seed
    and k alone: a longer run sees the samples of a shorter one first, in the same order.

    Indices are kept in `cache_dir` (see `index_cache`). Raises ValueError if the documents hold no tokens or
    absurdly few, or, when read, a token is not below `vocab_size`.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: tuple[int, int],
        num_samples: int,
        seq_length: int,
        seed: int,
        name: str,
        cache_dir: str | os.PathLike[str] | None = None,
        sample_format: SampleFormat = SampleFormat(),
        vocab_size: int | None = None,
    ) -> None:
        assert num_samples > 0 and seq_length > 0, (num_samples, seq_length)
        self.indexed, self.name = indexed, name
        self._first_document = documents[0]
        self._num_samples, self.seq_length, self._seed = num_samples, seq_length, seed
        self._format, self._vocab_size = sample_format, vocab_size
        self.tokens_per_epoch = indexed.count_tokens(*documents)
        if self.tokens_per_epoch == 0:
            raise ValueError(
                f"{indexed.prefix}: the {name} split (documents {documents[0]}-{documents[1]}) has no tokens"
            )
        self.num_epochs = math.ceil((num_samples * seq_length + 1) / self.tokens_per_epoch)
        if self.num_epochs > _MOST_EPOCHS:
            raise ValueError(
                f"{indexed.prefix}: the {name} split has {self.tokens_per_epoch} tokens, which {num_samples} samples "
                f"of {seq_length} tokens would read {self.num_epochs} times: give it more documents or fewer samples"
            )
        description = {
            "format": 2, "prefix": os.path.basename(indexed.prefix), "fingerprint": indexed.fingerprint,
            "documents": list(documents), "seq_length": seq_length, "seed": seed, "num_epochs": self.num_epochs,
        }  # fmt: skip
        count = documents[1] - documents[0]
        samples = (self.num_epochs * self.tokens_per_epoch - 1) // seq_length
        types = {
            "document_index": ArrayType((self.num_epochs * count,), smallest_integer(count)),
            "sample_index": ArrayType((samples + 1, 2), smallest_integer(self.num_epochs * count)),
            "shuffle_index": ArrayType((samples,), smallest_integer(samples)),
        }
        arrays = cached_arrays(cache_dir, description, types, partial(self._build, documents))
        self.document_index = arrays["document_index"]
        self.sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]

    def _build(self, documents: tuple[int, int], put: Put) -> None:
        """Puts the indices of one epoch after the other, so that memory does not grow with their number."""
        start, stop = documents
        lengths = self.indexed.document_lengths(start, stop)
        tokens, step = self.tokens_per_epoch, self.seq_length
        end = 0
        for epoch in range(self.num_epochs):
            order = _shuffled(stop - start, 0, self._seed, epoch, _DOCUMENTS)
            put("document_index", order)
            first = -epoch * tokens % step
            rows = sample_starts(lengths, order, step, first, tokens)
            rows = rows.astype(smallest_integer(self.num_epochs * (stop - start)), copy=False)
            rows[:, 0] += epoch * (stop - start)
            put("sample_index", rows)
            begin, end = end, ((epoch + 1) * tokens - 1) // step
            put("shuffle_index", _shuffled(end - begin, begin, self._seed, epoch, _SAMPLES))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        parts = self._read(int(self.shuffle_index[index]))
        tokens = np.concatenate(parts)
        if self._vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(
                f"{self.indexed.prefix} has the token id {tokens.max()}, which is outside the vocabulary of "
                f"{self._vocab_size}: it was made with another tokenizer"
            )
        return make_sample(tokens, self._format, [len(part) for part in parts])

    def _read(self, sample: int) -> list[NDArray]:
        """The seq_length + 1 tokens of a sample, by document; counted in the order before shuffling."""
        (first, offset), (last, end) = self.sample_index[sample].tolist(), self.sample_index[sample + 1].tolist()
        parts = []
        for position in range(first, last + 1):
            document = self._first_document + int(self.document_index[position])
            start = offset if position == first else 0
            length = end + 1 - start if position == last else None
            parts.append(self.indexed.get_document(document, start, length))
        return parts


class MockGPTDataset:
    """Generated samples: each counts up from a random token by a random step, so that a model can learn them.

    Sample k depends on the seed and k alone.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_length: int,
        num_samples: int,
        seed: int,
        sample_format: SampleFormat = SampleFormat(),
    ) -> None:
        assert vocab_size > 0 and seq_length > 0 and num_samples > 0, (vocab_size, seq_length, num_samples)
        self._format = sample_format
        self._vocab_size, self.seq_length, self._num_samples, self._seed = vocab_size, seq_length, num_samples, seed

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, index])))
        start, step = random.randint(0, self._vocab_size), random.randint(1, 8)
        return make_sample((start + step * np.arange(self.seq_length + 1)) % self._vocab_size, self._format)
