"""One rank of a job of any size, built in one process without a device: shapes, parameters, and memory.

Tensors are on torch's meta device, which knows shapes and types but holds no values, and the process groups are of
torch's fake backend, whose collectives return at once. The model, its buffers and its optimizer are the real ones.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from megatron.core.config import ParallelConfig
from megatron.core.microbatch import Microbatch
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.pipeline_parallel.schedules import Forward, passes
from megatron.core.recompute import RecomputeConfig
from megatron.core.stages import Stage, whole_model
from megatron.core.tokenizers import build_tokenizer
from megatron.training.config import Arguments
from megatron.training.setup import ForwardStep, ModelProvider, Trainer, build_trainer

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class ChunkReport:
    """One stage on the rank."""

    stage: Stage
    parameters: int
    """Elements on this rank."""
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    """Of what goes to the next stage; () for the loss."""
    activation_bytes: int
    """What autograd keeps of one microbatch until its backward pass."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What is known of a rank before it runs; bytes unless said otherwise."""

    groups: ProcessGroups
    chunks: tuple[ChunkReport, ...]
    model_parameters: int
    """Of the whole model, each once, without the padding of the vocabulary."""
    weights: int
    gradients: int
    optimizer: int
    sharded_optimizer: int
    """The optimizer's state with --use-distributed-optimizer."""
    activations: int
    """At the moment when most microbatches are alive."""
    live: int
    """How many chunks' microbatches that are."""
    microbatches: int


def dry_run(arguments: Arguments, model_provider: ModelProvider, forward_step: ForwardStep) -> DryRun:
    """Builds the rank that --dry-run names. Raises ValueError if the layout, the batch or the model do not fit."""
    rank, world_size = parse_rank(arguments.training.dry_run or "")
    with _fake_job(arguments.parallel, rank, world_size) as groups:
        plain, sharded = (
            build_trainer(
                replace(arguments, parallel=replace(arguments.parallel, use_distributed_optimizer=distributed)),
                groups, META, model_provider, forward_step, initialize=False,
            )
            for distributed in (False, True)
        )  # fmt: skip
        probe = _activation_probe(arguments, groups, model_provider)
        try:
            chunks = tuple(_run_chunk(plain, model, chunk) for model, chunk in zip(probe, plain.model, strict=True))
        except NotImplementedError as error:  # values were asked for, such as how many tokens are dropped
            raise ValueError(f"this model cannot be run without values: {error}") from error
        single = replace(arguments, parallel=ParallelConfig())
        assert arguments.model.vocab_size is not None
        whole = model_provider(single, ProcessGroups(), META, whole_model(arguments.model.num_layers))
        padding = 2 * (arguments.model.padded_vocab_size(1) - arguments.model.vocab_size) * arguments.model.hidden_size
        activations, live = _peak(plain, chunks)
        return DryRun(
            groups=groups,
            chunks=chunks,
            model_parameters=sum(p.numel() for p in whole.parameters()) - padding,
            weights=sum(bucket.weights.nbytes for bucket in plain.buffers.buckets),
            gradients=sum(bucket.grads.nbytes for bucket in plain.buffers.buckets),
            optimizer=_optimizer_bytes(plain),
            sharded_optimizer=_optimizer_bytes(sharded),
            activations=activations,
            live=live,
            microbatches=plain.num_microbatches,
        )


def parse_rank(text: str) -> tuple[int, int]:
    """Rank and number of ranks from RANK/WORLD. Raises ValueError if it is no such thing."""
    rank, slash, world = text.partition("/")
    if not (slash and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(
            f"--dry-run takes RANK/WORLD, a rank from 0 and the number of ranks, such as 5/16; got {text!r}"
        )
    return int(rank), int(world)


@contextmanager
def _fake_job(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[ProcessGroups]:
    """The groups of one rank of a job whose other ranks do not exist."""
    # the fake backend is torch's own means for this, but lives among its test tools
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # messages between two ranks look for the backend of the tensor's device; named so, torch prints a warning
    backend = "fake" if parallel.context_parallel_size == 1 else "meta:fake"
    dist.init_process_group(backend, rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield build_process_groups(parallel, rank, world_size, control_backend=backend)
    finally:
        dist.destroy_process_group()


def _activation_probe(arguments: Arguments, groups: ProcessGroups, model_provider: ModelProvider) -> list[MixtralModel]:
    """Stages that keep as much of a microbatch as the real ones do where tokens are spread evenly over the experts.

    How many tokens come to a rank's experts depends on values. If each rank had all experts, they would be its own.
    """
    here = replace(groups, ep=type(groups.ep)(), ep_etp=groups.etp)
    stages = arguments.parallel.stages(arguments.model.num_layers)[groups.pp.rank]
    return [model_provider(arguments, here, META, stage) for stage in stages]


def _run_chunk(trainer: Trainer, probe: MixtralModel, chunk: MixtralModel) -> ChunkReport:
    """Forward and backward of one microbatch; what the forward pass keeps is counted."""
    arguments, link = trainer.arguments, trainer.link
    tokens = torch.empty(arguments.training.micro_batch_size, arguments.data.seq_length, dtype=torch.int64, device=META)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.empty_like(tokens, dtype=torch.float32)}
    hidden = None
    if not chunk.stage.has_embedding:
        hidden = torch.empty(link.shape, dtype=link.dtype, device=META, requires_grad=True)
    weights = {parameter.untyped_storage()._cdata for parameter in probe.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with _AcceleratorKernels(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = trainer.forward_step(probe, batch, hidden, Microbatch())
    activation_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    if arguments.recompute == RecomputeConfig():  # what is recomputed would not meet the kernels above
        output.backward(None if chunk.stage.has_output else torch.empty_like(output))
        assert hidden is None or (hidden.grad is not None and hidden.grad.shape == hidden.shape)
    assert chunk.stage.has_output or output.shape == link.shape, (output.shape, link.shape)
    return ChunkReport(
        stage=chunk.stage,
        parameters=sum(parameter.numel() for parameter in chunk.parameters()),
        input_shape=tuple(tokens.shape if hidden is None else hidden.shape),
        output_shape=tuple(output.shape),
        activation_bytes=activation_bytes,
    )


class _FlashAttention(Function):
    """Keeps what FlashAttention keeps: query, key, value, output, and a float32 logarithm for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, sequence, width = query.shape
        output = query.new_empty(batch, sequence, heads, width).transpose(1, 2)
        log_sum_exp = query.new_empty(batch, heads, sequence, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _AcceleratorKernels(TorchFunctionMode):
    """What kernels do that torch has no meta form of.

    There, it would write attention out as products that keep S x S probabilities.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FlashAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def _peak(trainer: Trainer, chunks: tuple[ChunkReport, ...]) -> tuple[int, int]:
    """Most bytes of activations alive at once, and how many microbatches of chunks they are of."""
    live: list[int] = []
    most: list[int] = []
    for work in passes(trainer.pipeline, trainer.groups.pp.rank, trainer.num_microbatches):
        size = chunks[work.chunk].activation_bytes
        if isinstance(work, Forward):
            live.append(size)
        else:
            live.remove(size)
        most = max(most, list(live), key=sum)
    return sum(most), len(most)


def _optimizer_bytes(trainer: Trainer) -> int:
    """Masters and moments; a float32 parameter is its own master."""
    weights = {bucket.weights.untyped_storage()._cdata for bucket in trainer.buffers.buckets}
    tensors = [tensor for piece in trainer.optimizer.state_pieces() for tensor in piece.tensors.values()]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for storage, size in storages.items() if storage not in weights)


def table(result: DryRun, arguments: Arguments) -> str:
    """The report as text."""
    groups, model = result.groups, arguments.model
    places = [("pipeline", groups.pp), ("data", groups.dp), ("context", groups.cp), ("tensor", groups.tp)]
    if groups.ep.size > 1:
        places += [("expert", groups.ep), ("expert tensor", groups.etp)]
    lines = [
        f"dry run of rank {groups.world.rank} of {groups.world.size}: "
        + ", ".join(f"{name} {group.rank} of {group.size}" for name, group in places),
        f"Mixtral {model.num_layers} layers, hidden {model.hidden_size}, {model.num_experts} experts of "
        f"{model.ffn_hidden_size}, vocabulary {model.vocab_size}, {model.params_dtype}: {result.model_parameters:,} "
        "parameters in the whole model",
        f"{'stage':22} {'parameters':>15}  {'input':>17}  {'output':>17}  {'kept of a microbatch':>20}",
    ]
    for chunk in result.chunks:
        layers = chunk.stage.layers
        name = f"layers {layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"layer {layers.start}"
        name = (
            ("embedding, " if chunk.stage.has_embedding else "") + name + (", loss" if chunk.stage.has_output else "")
        )
        ends = [str(list(shape)) if shape else "loss" for shape in (chunk.input_shape, chunk.output_shape)]
        lines.append(
            f"{name:22} {chunk.parameters:15,}  {ends[0]:>17}  {ends[1]:>17}  {_gib(chunk.activation_bytes):>20}"
        )
    rows = [
        ("weights", result.weights, result.weights),
        ("gradients", result.gradients, result.gradients),
        ("optimizer", result.optimizer, result.sharded_optimizer),
        ("activations", result.activations, result.activations),
    ]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines.append(
        f"{'memory of the rank':22} {'optimizer whole':>15}  {'distributed over ' + str(groups.dp_cp.size):>17}"
    )
    lines += [f"{name:22} {_gib(whole):>15}  {_gib(shared):>17}" for name, whole, shared in rows]
    lines.append(
        f"activations are those of {result.live} live microbatches ({result.microbatches} in a step). Not included: "
        "temporary tensors, messages, the libraries' own memory"
    )
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def print_dry_run(
    arguments: Arguments, world_size: int, model_provider: ModelProvider, forward_step: ForwardStep
) -> None:
    """Prints the rank that --dry-run asks for. Raises ValueError in a job of several processes."""
    if world_size > 1:
        raise ValueError("--dry-run is for one process: start it with python, without torchrun")
    if arguments.model.vocab_size is None:
        tokenizer = build_tokenizer(arguments.tokenizer, None)
        arguments = replace(arguments, model=replace(arguments.model, vocab_size=tokenizer.vocab_size))
    print(table(dry_run(arguments, model_provider, forward_step), arguments))
