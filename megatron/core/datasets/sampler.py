"""Which samples each data-parallel rank reads."""

from collections.abc import Iterator


class PretrainingSampler:
    """Yields, microbatch after microbatch, the sample indices of one data-parallel rank.

    Samples are dealt out in order: step t gives rank r the `micro_batch_size` samples from
    `consumed_samples + (t * data_parallel_size + r) * micro_batch_size` on. Microbatches are therefore the same for any
    number of ranks, and so are the samples of a global batch. A remainder too small for one microbatch on every
    rank is left out.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        """Raises ValueError if fewer samples are left than one microbatch on every rank takes."""
        assert micro_batch_size > 0 and 0 <= data_parallel_rank < data_parallel_size and consumed_samples >= 0
        self._step = micro_batch_size * data_parallel_size
        if total_samples - consumed_samples < self._step:
            raise ValueError(
                f"the data has {total_samples} samples and {consumed_samples} are already consumed: fewer than the "
                f"{self._step} that one microbatch on every data-parallel rank takes are left; train on more "
                "samples or start from scratch"
            )
        self._total_samples = total_samples
        self._micro_batch_size = micro_batch_size
        self._first = consumed_samples
        self._offset = data_parallel_rank * micro_batch_size

    def __len__(self) -> int:
        return (self._total_samples - self._first) // self._step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            start = self._first + step * self._step + self._offset
            yield list(range(start, start + self._micro_batch_size))
