"""Weights and gradients of a rank in contiguous buffers, cut into buckets that are reduced and gathered as a whole.

Parameters lie in reverse order, since the backward pass finishes the last ones first. Each bucket belongs to the ranks
that hold the same parameters; with the distributed optimizer (ZeRO-1, arXiv:1910.02054) each of them owns an equal
shard of it, wherever that cuts a parameter.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core import collectives
from megatron.core.config import ParallelConfig
from megatron.core.host_memory import zeros
from megatron.core.microbatch import GradientFactors
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel.parameter import is_allocated, spec_of

# Every parameter and every shard starts at a multiple of this many elements: 128 bytes in 16-bit types, which
# matrix products and NCCL like, and more than any kernel requires.
ALIGNMENT = 64

# Elements of a bucket that are brought together at once where memory for the whole is not to be had.
PIECE = 1 << 25


class Piece(NamedTuple):
    """The part of one parameter that lies in a range of a bucket."""

    parameter: nn.Parameter
    start: int
    """First element in the flattened parameter."""
    end: int
    """Element after the last one in the flattened parameter."""
    offset: int
    """Place of the first element in the bucket."""


@dataclass(eq=False)
class Bucket:
    """Neighbouring parameters of the buffers that are communicated at once."""

    group: Group
    """Ranks that hold the same parameters."""
    parameters: list[nn.Parameter]
    offsets: list[int]
    """Place of each parameter in the bucket."""
    weights: Tensor
    """Flat; the parameters are views of it."""
    grads: Tensor
    """Flat; the parameters' `main_grad`s are views of it."""
    complete: int = 0
    """Parameters that have received the gradients of all microbatches of the step."""
    work: list[dist.Work] = field(default_factory=list)
    """Communication under way."""

    @property
    def own(self) -> slice:
        """The shard that belongs to this rank of the group."""
        size = self.weights.numel() // self.group.size
        return slice(self.group.rank * size, (self.group.rank + 1) * size)

    def pieces(self, part: slice) -> Iterator[Piece]:
        """What of each parameter lies in `part` of the bucket; padding belongs to none."""
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            start, end = max(part.start - offset, 0), min(part.stop - offset, parameter.numel())
            if start < end:
                yield Piece(parameter, start, end, offset + start)

    def finish(self) -> None:
        """Returns when the communication under way is done."""
        for work in self.work:
            collectives.wait(work)
        self.work.clear()


def main_grad(parameter: Tensor) -> Tensor:
    """The accumulated gradient of a parameter, of its shape, in the type it is reduced in."""
    return parameter.main_grad  # type: ignore[attr-defined]


def _aligned(size: int, multiple: int = ALIGNMENT) -> int:
    return -(-size // multiple) * multiple


class GradientBuffers:
    """Accumulates the gradients of a model and averages them over the ranks that hold the same parameters.

    Dense parameters are averaged over dp x cp. Expert parameters are summed over expert-data-parallel ranks only, but
    scaled by the same 1/(dp x cp): between them, the ranks have seen all tokens of the step either way.

    After `finalize`, gradients are whole on every rank, or with the distributed optimizer on the rank that owns them.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ProcessGroups,
        config: ParallelConfig | None = None,
        grads_in_bf16: bool = False,
    ) -> None:
        """`grads_in_bf16` keeps those of bfloat16 parameters in that type, as --grad-reduce-in-bf16 does."""
        self.groups, self.config = groups, config or ParallelConfig()
        self._grads_in_bf16 = grads_in_bf16 or self.config.grad_reduce_in_bf16
        self.sharded = self.config.use_distributed_optimizer
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.buckets = self._build(list(self.names))
        self._bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        self._arrivals = dict.fromkeys(self.names, 0)
        self._microbatches = 1
        self._launched = 0
        # in the order of the forward pass; of these, so many have been gathered or are being gathered
        self._gather_order = [bucket for bucket in reversed(self.buckets) if bucket.group.size > 1]
        self._gathered = len(self._gather_order)
        for parameter in self.names:
            parameter.register_post_accumulate_grad_hook(self._accumulate)
            # for operations that write the gradient themselves, see megatron.core.fusions.weight_gradient
            parameter.gradient_sink = functools.partial(self._receive, parameter)  # type: ignore[attr-defined]
        if self.sharded and self.config.overlap_param_gather:
            self._wait_before_use(model)

    def _build(self, parameters: list[nn.Parameter]) -> list[Bucket]:
        """Moves the parameters into flat buffers, or makes those without memory there; buckets in backward order."""
        order = {parameter: number for number, parameter in enumerate(parameters)}
        buckets: list[Bucket] = []
        for is_expert, group in ((False, self.groups.dp_cp), (True, self.groups.edp)):
            for dtype in sorted({p.dtype for p in parameters}, key=str):
                members = [p for p in reversed(parameters) if spec_of(p).is_expert == is_expert and p.dtype == dtype]
                if members:
                    buckets += _fill(members, group, self.config.bucket_size(group.size), self._grad_dtype(dtype))
        # a bucket is ready when its last member is, the first of them in the forward pass
        return sorted(buckets, key=lambda bucket: -order[bucket.parameters[-1]])

    def _grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self._grads_in_bf16 and dtype == torch.bfloat16:
            return dtype
        return torch.promote_types(dtype, torch.float32)

    def owned(self, bucket: Bucket) -> slice:
        """The part of a bucket that this rank updates."""
        return bucket.own if self.sharded else slice(0, bucket.weights.numel())

    def gathered(self, bucket: Bucket, read: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """The whole of a tensor that is shared out as the bucket is, in pieces: their places in the bucket and values.

        `read` gives a part of what this rank has of it, flat. Collective over the bucket's ranks if they own shards.
        """
        own = self.owned(bucket)
        size, ranks = own.stop - own.start, bucket.group.size if self.sharded else 1
        step = max(PIECE // ranks, 1)
        for start in range(0, size, step):
            values = read(slice(start, min(start + step, size)))
            joined = values
            if ranks > 1:
                joined = values.new_empty(ranks * values.numel())
                collectives.all_gather_single(joined, values, group=bucket.group.handle)
            for rank, part in enumerate(joined.view(ranks, -1)):
                yield slice(rank * size + start, rank * size + start + part.numel()), part

    def start_step(self, num_microbatches: int) -> None:
        """Forgets the gradients; every parameter will receive at most one from each microbatch.

        Parameters may still be under way: `finalize` has waited for everything else.
        """
        self._microbatches, self._launched = num_microbatches, 0
        for parameter in self._arrivals:
            self._arrivals[parameter] = 0
        for bucket in self.buckets:
            bucket.complete = 0

    def _accumulate(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        grad = parameter.grad
        if grad is None:
            return  # the sink has it already: autograd calls this hook even so
        self._receive(parameter, lambda out, beta: out.add_(grad) if beta else out.copy_(grad))
        parameter.grad = None

    def _receive(self, parameter: nn.Parameter, write: Callable[[Tensor, float], object]) -> None:
        """Lets `write` make main_grad = beta * main_grad + gradient; the first of a step has beta 0."""
        write(main_grad(parameter), 1.0 if self._arrivals[parameter] else 0.0)
        self._arrivals[parameter] += 1
        assert self._arrivals[parameter] <= self._microbatches, (
            f"{self.names[parameter]} received more gradients than there are microbatches"
        )
        if self._arrivals[parameter] == self._microbatches:
            self._bucket_of[parameter].complete += 1
            if self.config.overlap_grad_reduce:
                self._reduce_ready()

    def _reduce_ready(self) -> None:
        """Starts the reduction of complete buckets, in an order that is the same on all ranks.

        A bucket whose parameters got fewer gradients than microbatches (one was not used; experts without tokens get
        zeros) holds up those after it until `finalize`, since other ranks, where it is complete, reduce it first.
        """
        while self._launched < len(self.buckets):
            bucket = self.buckets[self._launched]
            if bucket.complete < len(bucket.parameters):
                return
            self._reduce(bucket)
            self._launched += 1

    def _reduce(self, bucket: Bucket) -> None:
        # a bucket that this rank's forward passes had no use for comes before reductions on the other ranks
        self._gather(len(self._gather_order))
        for parameter in bucket.parameters:
            if not self._arrivals[parameter]:
                main_grad(parameter).zero_()
        replicas = GradientFactors(dp=self.groups.dp.size, cp=self.groups.cp.size).replicas
        if replicas > 1:
            bucket.grads.div_(replicas)
        if bucket.group.size == 1:
            return
        if self.sharded:
            work = collectives.reduce_scatter_single(
                bucket.grads[bucket.own], bucket.grads, group=bucket.group.handle, async_op=True
            )
        else:
            work = collectives.all_reduce(bucket.grads, group=bucket.group.handle, async_op=True)
        bucket.work.append(work)

    def finalize(self) -> None:
        """Makes the gradients those of the whole step; collective over dp x cp, edp and tp."""
        for bucket in self.buckets[self._launched :]:
            self._reduce(bucket)
        self._launched = len(self.buckets)
        for bucket in self.buckets:
            bucket.finish()
        self._sum_sequence_partial()

    def _sum_sequence_partial(self) -> None:
        """Sums over tensor-parallel ranks the gradients of which each has seen only its slice of the sequence.

        These ranks own the same shards, and the sum is linear, so that it can come after the reduction.
        """
        if self.groups.tp.size == 1:
            return
        partial = [
            bucket.grads[piece.offset : piece.offset + piece.end - piece.start]
            for bucket in self.buckets
            for piece in bucket.pieces(self.owned(bucket))
            if spec_of(piece.parameter).sequence_partial_grad
        ]
        if not partial:
            return
        joined = torch.cat(partial)
        collectives.all_reduce(joined, group=self.groups.tp.handle)
        for grad, total in zip(partial, joined.split([grad.numel() for grad in partial]), strict=True):
            grad.copy_(total)

    def gather_parameters(self) -> None:
        """Brings the updated shards together, first those that the forward pass needs first; collective.

        With `overlap_param_gather` only the first bucket's gathering begins here, and that of each other when the
        forward pass comes to the bucket before it: all at once would queue up ahead of the forward pass's own messages.
        """
        if not self.sharded:
            return
        self._gathered = 0
        if self.config.overlap_param_gather:
            self._gather(1)
        else:
            self.wait_for_parameters()

    def _gather(self, number: int) -> None:
        """Begins to gather the first `number` of the buckets, as far as that has not begun."""
        for bucket in self._gather_order[self._gathered : number]:
            own = bucket.weights[bucket.own]
            work = collectives.all_gather_single(bucket.weights, own, group=bucket.group.handle, async_op=True)
            bucket.work.append(work)
        self._gathered = max(self._gathered, min(number, len(self._gather_order)))

    def _wait_before_use(self, model: nn.Module) -> None:
        """Makes each module wait, before its forward pass, for the buckets that its parameters are in.

        A module without a forward of its own is used by the one that contains it.
        """
        places = {parameter: n for n, bucket in enumerate(self._gather_order) for parameter in bucket.parameters}
        for module in model.modules():
            holders = [module, *(child for child in module.children() if type(child).forward is nn.Module.forward)]
            parameters = [parameter for holder in holders for parameter in holder.parameters(recurse=False)]
            needed = sorted({places[parameter] for parameter in parameters if parameter in places})
            if needed:
                module.register_forward_pre_hook(functools.partial(self._before_use, needed))

    def _before_use(self, needed: list[int], module: nn.Module, inputs: object) -> None:
        """Begins to gather the bucket after those that a module needs, and waits for these."""
        self._gather(needed[-1] + 2)
        for place in needed:
            self._gather_order[place].finish()

    def wait_for_parameters(self) -> None:
        """Returns when the parameters are those of the last update; before reading them other than by a forward.

        Collective over the ranks that hold the same parameters.
        """
        self._gather(len(self._gather_order))
        for bucket in self.buckets:
            bucket.finish()


def _fill(members: list[nn.Parameter], group: Group, bucket_size: int | None, grad_dtype: torch.dtype) -> list[Bucket]:
    """Buckets of at least `bucket_size` elements, in one buffer of weights and one of gradients."""
    cuts: list[tuple[list[nn.Parameter], list[int], int]] = []
    parameters: list[nn.Parameter] = []
    offsets: list[int] = []
    size = 0
    for parameter in members:
        parameters.append(parameter)
        offsets.append(size)
        size = _aligned(size + parameter.numel())
        if parameter is members[-1] or (bucket_size is not None and size >= bucket_size):
            cuts.append((parameters, offsets, _aligned(size, ALIGNMENT * group.size)))
            parameters, offsets, size = [], [], 0
    total = sum(length for _, _, length in cuts)
    weights = zeros(total, members[0].dtype, members[0].device)
    grads = zeros(total, grad_dtype, members[0].device)
    buckets, start = [], 0
    for parameters, offsets, length in cuts:
        part = slice(start, start + length)
        bucket = Bucket(group, parameters, offsets, weights[part], grads[part])
        for parameter, offset in zip(parameters, offsets, strict=True):
            place = slice(offset, offset + parameter.numel())
            if is_allocated(parameter):
                bucket.weights[place].copy_(parameter.detach().reshape(-1))
            parameter.data = bucket.weights[place].view_as(parameter)
            parameter.main_grad = bucket.grads[place].view_as(parameter)  # type: ignore[attr-defined]
        buckets.append(bucket)
        start += length
    return buckets
