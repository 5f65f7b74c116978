"""A tiny Mixtral, one training step of it under any layout, and the comparison of two steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from closeness import relative_error
from torch import Tensor

import pretrain_gpt
from megatron.core.config import DataConfig, ModelConfig, ParallelConfig, TokenizerConfig
from megatron.core.datasets.gpt_dataset import SampleFormat, make_sample
from megatron.core.distributed.gradient_buffers import GradientBuffers, main_grad
from megatron.core.models.common import parameter_specs
from megatron.core.models.mixtral.weights import layer_rows
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.recompute import RecomputeConfig
from megatron.core.tensor_parallel.parameter import NamedShard, Specs, named_shards, specs_of
from megatron.training.config import Arguments, CheckpointConfig, LoggingConfig, TrainingConfig
from megatron.training.loader import collate
from megatron.training.progress import Progress
from megatron.training.setup import build_trainer
from megatron.training.training import train_step

TINY_MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    max_position_embeddings=64,
    rotary_base=10000.0,
    vocab_size=203,
    make_vocab_size_divisible_by=8,
    num_experts=4,
    init_method_std=0.2,
    moe_aux_loss_coeff=0.1,
    moe_z_loss_coeff=0.01,
    params_dtype="float64",
)
SEQ_LENGTH, MICRO_BATCH, GLOBAL_BATCH = 16, 2, 8


def layer_specs(config: ModelConfig = TINY_MODEL, groups: ProcessGroups | None = None) -> Specs:
    """What the parameters of a layer of `config` are made of on a rank of `groups`."""
    specs = parameter_specs(layer_rows(config), config.num_experts, groups or ProcessGroups(), False)
    return specs_of("decoder.layers.{layer}", specs)


def tiny_arguments(params_dtype: str = "float64", settings: Mapping[str, Any] | None = None) -> Arguments:
    """Settings of a run of the tiny model; `settings` are fields of any of its configurations."""
    arguments = Arguments(
        model=replace(TINY_MODEL, params_dtype=params_dtype),
        parallel=ParallelConfig(),
        recompute=RecomputeConfig(),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_decay_style="cosine", lr_warmup_iters=2, weight_decay=0.1),
        tokenizer=TokenizerConfig(),
        data=DataConfig(seq_length=SEQ_LENGTH, mock_data=True),
        training=TrainingConfig(
            micro_batch_size=MICRO_BATCH, global_batch_size=GLOBAL_BATCH, train_iters=10, device="cpu"
        ),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
    )
    rest = dict(settings or {})
    changed = {}
    for part in fields(arguments):
        config = getattr(arguments, part.name)
        mine = {field.name: rest.pop(field.name) for field in fields(config) if field.name in rest}
        changed[part.name] = replace(config, **mine)
    assert not rest, f"no configuration has {sorted(rest)}"
    return Arguments(**changed)


def step_batches(step: int, dp_rank: int, dp_size: int, documents: bool = False) -> list[dict[str, Tensor]]:
    """This rank's microbatches of a step; the same ones, differently shared out, for every data-parallel size.

    With `documents`, each sample is cut into documents that do not see each other.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, TINY_MODEL.vocab_size or 0, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
    mask = (torch.rand(GLOBAL_BATCH, SEQ_LENGTH, generator=generator) > 0.2).double()
    microbatches = [
        {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "loss_mask": rows_mask}
        for rows, rows_mask in zip(text.split(MICRO_BATCH), mask.split(MICRO_BATCH), strict=True)
    ]
    if documents:
        kind = SampleFormat(reset_position_ids=True, reset_attention_mask=True)
        for number, batch in enumerate(microbatches):
            lengths = ([3, 1, 13], [SEQ_LENGTH + 1], [9, 8], [1, 1, 5, 10])[number]
            samples = [make_sample(np.arange(SEQ_LENGTH + 1), kind, lengths[:: 1 - 2 * i]) for i in range(MICRO_BATCH)]
            batch |= {name: collate(samples)[name] for name in ("position_ids", "document_bounds")}
    return microbatches[dp_rank::dp_size]


@dataclass
class StepOutcome:
    """What one rank saw; plain values and tensors, so that it can be sent between processes."""

    numbers: list[dict[str, float]]
    """Loss, load-balancing loss, z-loss and gradient norm of each step."""
    gradients: dict[str, tuple[Tensor, int | None, int, int]]
    """Unclipped gradients of the first step by global name: local part, partition_dim, stride, rank in the group that
    splits the tensor."""
    weights: dict[str, tuple[Tensor, int | None, int, int]]
    """Weights after the last step."""


def _shards(shards: list[NamedShard]) -> dict[str, tuple[Tensor, int | None, int, int]]:
    return {
        shard.global_name: (
            shard.data.clone(),
            shard.spec.partition_dim,
            shard.spec.partition_stride,
            shard.spec.group.rank,
        )
        for shard in shards
    }


def _named_shards(model: Any) -> list[NamedShard]:
    return [shard for chunk in model for shard in named_shards(chunk, chunk.first_layer)]


def _gradient_shards(model: Any) -> list[NamedShard]:
    shards = []
    with torch.no_grad():
        saved = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.copy_(main_grad(parameter))
        for shard in _named_shards(model):
            shards.append(NamedShard(shard.global_name, shard.stage_name, shard.data.clone(), shard.spec))
        for parameter, value in zip(model.parameters(), saved, strict=True):
            parameter.copy_(value)
    return shards


def _gather_gradients(buffers: GradientBuffers) -> None:
    """Makes the gradients whole on every rank, where each has only its own shard."""
    for bucket in buffers.buckets:
        if buffers.sharded and bucket.group.size > 1:
            own = bucket.grads[bucket.own].clone()
            dist.all_gather(list(bucket.grads.chunk(bucket.group.size)), own, group=bucket.group.handle)


def train_tiny(rank: int, world_size: int, settings: Mapping[str, Any], params_dtype: str, steps: int) -> StepOutcome:
    """Trains the tiny model for some steps on this rank of the layout that `settings` describe."""
    arguments = tiny_arguments(params_dtype, settings)
    groups = build_process_groups(arguments.parallel, rank, world_size) if world_size > 1 else ProcessGroups()
    cpu = torch.device("cpu")
    trainer = build_trainer(arguments, groups, cpu, pretrain_gpt.model_provider, pretrain_gpt.forward_step)
    progress, numbers, gradients = Progress(), [], {}
    finalize = trainer.buffers.finalize

    def finalize_and_keep() -> None:
        finalize()
        if not gradients:
            _gather_gradients(trainer.buffers)
            gradients.update(_shards(_gradient_shards(trainer.model)))

    trainer.buffers.finalize = finalize_and_keep  # type: ignore[method-assign]
    for step in range(steps):
        documents = arguments.data.reset_attention_mask
        source = iter(step_batches(step, groups.dp.rank, groups.dp.size, documents))
        record, _ = train_step(trainer, source, progress)
        numbers.append(
            {
                "lm_loss": record.averages.lm_loss,
                "load_balancing_loss": record.averages.load_balancing_loss,
                "z_loss": record.averages.z_loss,
                "grad_norm": record.grad_norm,
            }
        )
    trainer.buffers.wait_for_parameters()
    weights = _shards(_named_shards(trainer.model))
    return StepOutcome(numbers, gradients, weights)


def join_from_tp(parts: Sequence[Tensor], partition_dim: int | None, stride: int) -> Tensor:
    """The whole tensor from its parts in rank order: the inverse of `slice_for_rank`.

    With `partition_dim` None every rank holds a copy; they must be equal bit for bit, otherwise ValueError.
    """
    if len(parts) == 1:
        return parts[0]
    if partition_dim is None:
        for rank, part in enumerate(parts):
            if part.dtype != parts[0].dtype or not torch.equal(part, parts[0]):
                raise ValueError(f"a tensor that every rank holds whole differs between ranks 0 and {rank}")
        return parts[0]
    blocks = [part.chunk(stride, dim=partition_dim) for part in parts]
    return torch.cat([rank_blocks[i] for i in range(stride) for rank_blocks in blocks], dim=partition_dim)


def join_shards(parts: list[dict[str, tuple[Tensor, int | None, int, int]]]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all ranks; copies on several ranks must be equal."""
    whole: dict[str, Tensor] = {}
    for name in sorted({name for part in parts for name in part}):
        by_rank: dict[int, Tensor] = {}
        for part in parts:
            if name in part:
                tensor, dim, stride, shard = part[name]
                if shard in by_rank:
                    assert torch.equal(by_rank[shard], tensor), f"{name} differs between the ranks that hold it"
                by_rank[shard] = tensor
        whole[name] = join_from_tp([by_rank[rank] for rank in sorted(by_rank)], dim, stride)
    return whole


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The relative error of `a`, with vocabulary padding rows cut."""
    rows = min(a.shape[0], b.shape[0])
    assert not a[rows:].any() and not b[rows:].any(), "padding rows must stay zero"
    return relative_error(a[:rows], b[:rows])
