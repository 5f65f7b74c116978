"""What a run says of itself before its first step."""

from typing import Any

import torch

from megatron.core.config import DataConfig
from megatron.core.datasets.blended_dataset import blend_summary, source_table
from megatron.training.setup import Trainer


def summary(trainer: Trainer) -> str:
    """Model, layout and batch in two lines, and where the optimizer's state is if the host has a share of it."""
    groups, model, kind = trainer.groups, trainer.arguments.model, trainer.model.first.kind
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    context = f"context {groups.cp.size} x " if groups.cp.size > 1 else ""
    return (
        f"{kind} {model.num_layers} layers, hidden {model.hidden_size}, {model.num_experts} experts of "
        f"{model.ffn_hidden_size}, top {model.moe_router_topk}, vocabulary {model.vocab_size}, {model.params_dtype}\n"
        f"{groups.world.size} {trainer.device.type} process(es): tensor {groups.tp.size} x pipeline {groups.pp.size} x "
        f"{context}data {groups.dp.size}, sequence parallel {'on' if trainer.model.sequence_parallel else 'off'}; "
        f"{parameters:,} parameters on the first rank; batch {trainer.batch_size} = {groups.dp.size} x "
        f"{trainer.num_microbatches} microbatches of {trainer.arguments.training.micro_batch_size}{_offloaded(trainer)}"
    )


def _offloaded(trainer: Trainer) -> str:
    optimizer = trainer.optimizer
    if not optimizer.host_bytes:
        return ""
    return (
        f"\noptimizer on the first rank: {optimizer.device_bytes / 2**30:.2f} GiB on the device, "
        f"{optimizer.host_bytes / 2**30:.2f} GiB in the host's memory, updated there by {torch.get_num_threads()} "
        "thread(s)"
    )


def data_tables(config: DataConfig, datasets: tuple[Any, Any, Any]) -> str:
    """What the run reads of every source: for training, and for evaluations where they have data of their own."""
    own = bool(config.train_data_path or config.per_split_data_args_path)
    purposes = ("training", "a validation", "the test at the end")
    tables = [
        f"data for {purpose}: {len(dataset):,} samples of {config.seq_length:,} tokens\n{source_table(rows)}\n"
        for purpose, dataset in zip(purposes if own else purposes[:1], datasets, strict=False)
        if (rows := blend_summary(dataset))
    ]
    return "".join(tables)
