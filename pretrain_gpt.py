"""Pre-trains a Mixtral model; `python pretrain_gpt.py --help` lists the flags."""

import sys
from dataclasses import replace
from typing import Any

from megatron.training.signals import remember_signals

if __name__ == "__main__":  # the imports that follow take seconds
    remember_signals(sys.argv)

import torch
from torch import Tensor

from megatron.core.context_parallel.zigzag import split_batch
from megatron.core.datasets.blended_dataset import build_train_valid_test_datasets
from megatron.core.fusions.attention import Documents
from megatron.core.microbatch import Microbatch
from megatron.core.models.common import ModelStage
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import ProcessGroups
from megatron.core.stages import Stage
from megatron.core.tensor_parallel.mappings import all_reduce
from megatron.training.config import Arguments
from megatron.training.logs.averages import MicrobatchResult
from megatron.training.training import pretrain


def model_provider(
    arguments: Arguments,
    groups: ProcessGroups,
    device: torch.device,
    stage: Stage | None = None,
    allocate: bool = True,
) -> MixtralModel:
    """One stage of the model, the whole of it if no `stage` is given; see `Placement` for `allocate`."""
    return MixtralModel(
        arguments.model,
        groups=groups,
        sequence_parallel=arguments.parallel.sequence_parallel,
        device=device,
        stage=stage,
        recompute=arguments.recompute,
        allocate=allocate,
    )


def datasets_provider(arguments: Arguments, num_samples: tuple[int, int, int], tokenizer: Any) -> tuple[Any, Any, Any]:
    """Train, validation and test data sets, None where a split is empty."""
    return build_train_valid_test_datasets(arguments.data, num_samples, arguments.training.seed, tokenizer)


def forward_step(
    model: ModelStage, batch: dict[str, Tensor] | None, hidden: Tensor | None, microbatch: Microbatch
) -> tuple[Tensor, MicrobatchResult]:
    """One microbatch through one stage; on the last one its loss, over the tokens whose `loss_mask` is 1.

    That is returned twice: times the factors of its gradient, and as the mean that is logged. Where ranks split a
    sequence, each has its part of the mean times their number, since both are averaged over them.
    """
    batch = split_batch(batch or {}, model.cp)
    documents = None
    if "document_bounds" in batch:
        documents = Documents.from_bounds(batch["document_bounds"], batch["tokens"].device)
    microbatch = replace(
        microbatch, labels=batch.get("labels"), position_ids=batch.get("position_ids"), documents=documents
    )
    output, statistics = model(batch["tokens"] if hidden is None else hidden, microbatch)
    if not model.stage.has_output:
        return output, MicrobatchResult(None, statistics, model.first_layer)
    mask = batch["loss_mask"]
    tokens = all_reduce(mask.sum(), model.cp).clamp(min=1)
    loss = (output * mask).sum()
    mean = loss.detach() * (model.cp.size / tokens)
    return loss * microbatch.factors.loss(tokens), MicrobatchResult(mean, statistics, model.first_layer)


if __name__ == "__main__":
    pretrain(model_provider, datasets_provider, forward_step)
