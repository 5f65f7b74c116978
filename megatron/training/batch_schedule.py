"""How many samples each step takes, while the batch grows at the beginning of a run and afterwards."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch as a function of the samples already consumed, as in Megatron-LM.

    It starts at `first` and grows by `increment` until it is `last`, in equal steps over `samples` samples.
    """

    last: int
    """Samples in a step when the batch does not grow any more."""
    unit: int
    """Samples in one microbatch of every replica; each batch is a multiple of it."""
    first: int = 0
    increment: int = 0
    samples: int = 0

    @property
    def sizes(self) -> range:
        """All batches that occur."""
        return range(self.first, self.last + 1, self.increment) if self.increment else range(self.last, self.last + 1)

    def batch_size(self, consumed_samples: int) -> int:
        """Samples of the step that starts after `consumed_samples`."""
        if consumed_samples >= self.samples or not self.increment:
            return self.last
        increments = (self.last - self.first) // self.increment
        return self.first + self.increment * (consumed_samples * increments // self.samples)

    def num_microbatches(self, consumed_samples: int) -> int:
        """Microbatches of each replica in that step."""
        return self.batch_size(consumed_samples) // self.unit

    def samples_after(self, iterations: int, consumed_samples: int = 0) -> int:
        """Samples consumed after so many more steps."""
        while iterations > 0 and self.batch_size(consumed_samples) != self.last:
            consumed_samples += self.batch_size(consumed_samples)
            iterations -= 1
        return consumed_samples + max(0, iterations) * self.last

    def iterations_within(self, total_samples: int, consumed_samples: int = 0) -> int:
        """Steps until fewer samples of `total_samples` are left than the next step takes."""
        iterations = 0
        while (size := self.batch_size(consumed_samples)) != self.last and consumed_samples + size <= total_samples:
            consumed_samples += size
            iterations += 1
        return iterations + max(0, total_samples - consumed_samples) // size


def build_batch_schedule(
    global_batch_size: int | None, rampup: tuple[int, ...], micro_batch_size: int, data_parallel_size: int
) -> BatchSchedule:
    """The schedule that the flags describe. Raises ValueError if a batch cannot be shared out evenly."""
    unit = micro_batch_size * data_parallel_size
    last = unit if global_batch_size is None else global_batch_size
    if last % unit:
        raise ValueError(
            f"--global-batch-size ({last}) is not a multiple of --micro-batch-size ({micro_batch_size}) x "
            f"data-parallel size ({data_parallel_size}) = {unit}"
        )
    if not rampup:
        return BatchSchedule(last, unit)
    if len(rampup) != 3 or min(rampup) <= 0:
        raise ValueError(f"--rampup-batch-size takes three positive numbers, START INCREMENT SAMPLES, got {rampup}")
    first, increment, samples = rampup
    if first > last or (last - first) % increment:
        raise ValueError(
            f"--rampup-batch-size {first} {increment} {samples}: steps of {increment} do not lead from {first} to "
            f"--global-batch-size {last}"
        )
    uneven = [size for size in range(first, last + 1, increment) if size % unit]
    if uneven:
        raise ValueError(
            f"--rampup-batch-size {first} {increment} {samples}: a batch of {uneven[0]} is not a multiple of "
            f"--micro-batch-size ({micro_batch_size}) x data-parallel size ({data_parallel_size}) = {unit}: make START "
            f"and INCREMENT multiples of {unit}"
        )
    return BatchSchedule(last, unit, first, increment if last > first else 0, samples)
