"""Microbatches of a data set, read and put together by loader processes ahead of the steps that need them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from megatron.core.atomic_files import error_sentence
from megatron.core.datasets.gpt_dataset import Sample
from megatron.core.datasets.sampler import PretrainingSampler
from megatron.training.signals import ignore_stop_signals

Batch = dict[str, Tensor]
# Microbatches that each loader process keeps ready, so that a slow read does not hold up a step.
_PREFETCHED = 4


class _Reported:
    """A data set in a loader's process; what is wrong with a sample is its value, since DataLoader hides sentences."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: Any) -> Sample | Exception:
        try:
            return self._dataset[index]
        except (ValueError, OSError) as error:
            return error

    def __len__(self) -> int:
        return len(self._dataset)


_REMEDY = "give the container more with --shm-size, or read in the training process with --num-workers 0"


def _collate_reported(samples: Sequence[Sample | Exception]) -> Batch | Exception:
    failed = next((sample for sample in samples if isinstance(sample, Exception)), None)
    if failed is not None:
        return failed
    batch = collate(samples)  # type: ignore[arg-type]
    if get_worker_info() is not None:
        # torch would do this in a thread that only prints what goes wrong, and the batch would be waited for for ever
        try:
            for tensor in batch.values():
                tensor.share_memory_()
        except RuntimeError as error:
            return ValueError(
                f"the shared memory of this machine (/dev/shm) is too small for batches ({error}): {_REMEDY}"
            )
    return batch


def worker_killed(error: Exception) -> str | None:
    """What to tell the user if `error` says that a loader's process was killed; None for any other error."""
    found = re.search(r"DataLoader worker .*(killed by signal: .*?\.|exited unexpectedly)", str(error))
    if found is None:
        return None
    return (
        f"a process that reads data ahead was lost ({found[1].rstrip('.')}): memory or shared memory (/dev/shm) may be "
        f"short; {_REMEDY}"
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of S tokens as one microbatch: everything [B, S], and documents as `document_bounds`.

    `document_bounds` (int32 [documents + 1]) says where documents begin in the samples laid end to end, if the samples
    have `document_lengths`.
    """
    batch = {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples]))
        for name in samples[0]
        if name != "document_lengths"
    }
    if "document_lengths" in samples[0]:
        lengths = np.concatenate([sample["document_lengths"] for sample in samples])
        batch["document_bounds"] = torch.from_numpy(np.cumsum(np.append(0, lengths), dtype=np.int32))
    return batch


def load_batches(dataset: Any, sampler: PretrainingSampler, num_workers: int, device: torch.device) -> Iterator[Batch]:
    """The sampler's microbatches, on `device` but for `document_bounds`, which the host needs to know.

    Raises ValueError with the sentence of a sample that cannot be read, or if there is no room to hand batches over.
    """
    loader: DataLoader[Batch | Exception] = DataLoader(
        _Reported(dataset),  # type: ignore[arg-type]
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=_collate_reported,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        worker_init_fn=ignore_stop_signals,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise every new loader would draw from the state that checkpoints keep
    )
    try:
        loaded = iter(loader)
    except OSError as error:
        raise ValueError(f"no process that reads data ahead can be started ({error}): {_REMEDY}") from error
    for batch in loaded:
        if isinstance(batch, Exception):
            raise ValueError(error_sentence(batch)) from batch  # type: ignore[arg-type]
        yield {
            name: tensor if name == "document_bounds" else tensor.to(device, non_blocking=True)
            for name, tensor in batch.items()
        }
