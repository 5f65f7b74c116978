"""Microbatches of a data set, read and put together by loader processes ahead of the steps that need them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron.core.datasets.gpt_dataset import Sample
from megatron.core.datasets.sampler import PretrainingSampler
from megatron.training.signals import leave_stopping_to_the_parent

Batch = dict[str, Tensor]
# Microbatches that each loader process keeps ready, so that a slow read does not hold up a step.
_PREFETCHED = 4


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
    """The sampler's microbatches, on `device` but for `document_bounds`, which the host needs to know."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        worker_init_fn=leave_stopping_to_the_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise every new loader would draw from the state that checkpoints keep
    )
    for batch in loader:
        yield {
            name: tensor if name == "document_bounds" else tensor.to(device, non_blocking=True)
            for name, tensor in batch.items()
        }
