"""How many bytes a rank gives to each collective in one training step, calculated from the layout.

Counted as by `counter.CommunicationCounter`. Where experts are shared out, the numbers of rows that a rank receives
depend on the routing: the formulas then give the average over the ranks of ep x etp, which is exact for their sum. With
the distributed optimizer the same holds for the gradients that are summed over tensor-parallel ranks. A capacity of
experts drops rows that are counted here.

Names: `a` bytes of an activation, `w` bytes of its type or of float32 if that is wider, `m` microbatches, `whole`
tokens of a microbatch in tensor-parallel regions, `T` between them (fewer with sequence parallelism).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron.core.config import ModelConfig, ParallelConfig
from megatron.core.distributed.gradient_buffers import ALIGNMENT
from megatron.core.models.mixtral.weights import mixtral_table
from megatron.core.models.weight_table import WeightRule
from megatron.core.parallel_state import grid_sizes
from megatron.core.recompute import NO_RECOMPUTE, RecomputeConfig
from megatron.core.stages import Stage


class Traffic(NamedTuple):
    """Bytes that a rank gives to one kind of collective in a step."""

    kind: str
    """TP, CP, PP, experts (of EP and ETP, and tokens gathered for experts that TP splits), DP, or control."""
    purpose: str
    operation: str
    group: str
    """Name of the group in ProcessGroups; messages between stages are `pp_forward_out` and `pp_backward_out`."""
    ranks: int
    """Ranks of the group."""
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step of one layout."""

    model: ModelConfig
    parallel: ParallelConfig
    recompute: RecomputeConfig = NO_RECOMPUTE
    world_size: int
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    loss_mask_bytes: int = 4
    """Bytes of an element of the loss mask."""
    reported: bool = True
    """Whether the training loop brings the numbers of the step together: losses, load of all experts, time of ranks."""


def step_traffic(step: Step, pp_rank: int) -> list[Traffic]:
    """All that a rank of pipeline stage `pp_rank` gives to collectives in a step; rows of one purpose are apart."""
    return _Account(step, pp_rank).entries()


class _Account:
    def __init__(self, step: Step, pp_rank: int) -> None:
        self.step, self.model, self.pp_rank = step, step.model, pp_rank
        dense, expert = grid_sizes(step.parallel, step.world_size)
        self.sizes = dense | expert
        self.sizes |= {
            "dp_cp": dense["dp"] * dense["cp"],
            "tp_cp": dense["tp"] * dense["cp"],
            "ep_etp": expert["ep"] * expert["etp"],
            "world": step.world_size,
        }
        self.stages = step.parallel.stages(step.model.num_layers)
        self.chunks = self.stages[pp_rank]
        self.layers = sum(len(chunk.layers) for chunk in self.chunks)
        self.sequence_parallel = step.parallel.sequence_parallel and dense["tp"] > 1
        self.m = step.num_microbatches
        self.a = step.model.dtype.itemsize
        self.w = torch.promote_types(step.model.dtype, torch.float32).itemsize
        self.whole = step.seq_length // dense["cp"] * step.micro_batch_size  # tokens within tensor-parallel regions
        self.T = self.whole // (dense["tp"] if self.sequence_parallel else 1)
        units = [unit for chunk in self.chunks for unit in step.recompute.units(len(chunk.layers))]
        self.again = sum(len(layers) for layers, again in units if again)
        self.units_again = sum(again for _, again in units)
        self.found: list[Traffic] = []

    def add(self, kind: str, purpose: str, operation: str, group: str, size: float) -> None:
        """Notes `size` bytes, unless nothing is sent."""
        ranks = self.sizes.get(group, 2)  # two at the ends of a connection between stages
        if size and ranks > 1:
            self.found.append(Traffic(kind, purpose, operation, group, ranks, size))

    def add_region(self, purpose: str, gathered: float, scattered: float, reduced: float) -> None:
        """Notes what a tensor-parallel product sends, with sequence parallelism or without."""
        if self.sequence_parallel:
            self.add("TP", purpose, "all-gather", "tp", gathered)
            self.add("TP", purpose, "reduce-scatter", "tp", scattered)
        else:
            self.add("TP", purpose, "all-reduce", "tp", reduced)

    def entries(self) -> list[Traffic]:
        self._dense_layers()
        self._ring()
        self._router()
        self._experts()
        self._ends()
        self._pipeline()
        self._gradients()
        self.add("control", "gradient norm", "all-reduce", "world", 8)
        if self.step.reported:
            numbers = 4 + self.model.num_layers * self.model.num_experts + self.step.world_size
            self.add("control", "reported numbers", "all-reduce", "world", 8 * numbers)
        return self.found

    def _dense_layers(self) -> None:
        """Attention's products, forward (again where recomputed) and backward."""
        x = self.whole * self.model.hidden_size * self.a
        forward, backward = self.m * (self.layers + self.again), self.m * self.layers
        sums = (forward + backward) * x
        self.add_region("attention", (forward + 2 * backward) * x, scattered=sums, reduced=sums)

    def _ring(self) -> None:
        """Keys and values travel around the ring forward and backward, their gradients once around and home."""
        cp = self.sizes["cp"]
        keys_values = 2 * self.whole * self.model.query_groups // self.sizes["tp"] * self.model.head_dim
        again = self.again + (self.layers if self.step.recompute.includes("core_attn") else 0)
        passes = self.m * (2 * self.layers + again)
        self.add("CP", "keys and values", "send", "cp", passes * (cp - 1) * keys_values * self.a)
        self.add("CP", "their gradients", "send", "cp", self.m * self.layers * cp * keys_values * self.w)

    @property
    def _routings(self) -> int:
        moe = self.layers if self.step.recompute.includes("moe") else 0
        return self.m * (self.layers + self.again + moe)

    def _router(self) -> None:
        """Statistics of the whole microbatch, and with a capacity the choices of all its tokens."""
        model, group = self.model, "tp_cp" if self.sequence_parallel else "cp"
        sets = self.step.micro_batch_size if model.moe_router_load_balancing_type == "seq_aux_loss" else 1
        statistics = 2 * model.num_experts * sets + 1
        self.add("experts", "router statistics", "all-reduce", group, self._routings * statistics * self.w)
        if model.moe_expert_capacity_factor is not None:
            probs = self.w * model.moe_router_topk if model.moe_token_drop_policy == "probs" else 0
            tokens = self.sizes[group] * self.T
            size = self._routings * tokens * (8 * model.moe_router_topk + 8 + probs)
            self.add("experts", "capacity", "all-gather", group, size)

    def _experts(self) -> None:
        """Tokens to their experts and back."""
        model, sizes = self.model, self.sizes
        row, pairs = model.hidden_size * self.a, self.T * model.moe_router_topk
        backward = self.m * self.layers
        forward = self._routings
        # recomputation stops at the last tensor that is needed, before results are brought together once more
        combined = self.m * (self.layers + self.again - self.units_again)
        n = sizes["ep_etp"]
        replicated = sizes["tp"] > 1 and not self.sequence_parallel
        if n == 1 or replicated:
            x, probs = self.T * row, pairs * self.w
            self.add("experts", "experts", "all-reduce", "etp", (backward + combined) * x + backward * probs)
        elif sizes["ep"] == 1 or model.moe_token_dispatcher_type == "allgather":
            x, probs = n * self.T * row, n * pairs * self.w
            if sizes["ep"] > 1:
                self.add("experts", "counts", "all-gather", "ep_etp", forward * n * 8 * (1 + model.num_experts))
            gathered = forward * (x + probs + n * pairs * 8) + backward * x
            self.add("experts", "experts", "all-gather", "ep_etp", gathered)
            self.add("experts", "experts", "reduce-scatter", "ep_etp", combined * x + backward * (x + probs))
        else:
            # the tokens' way back is followed by a sum that keeps tensors, so that recomputation goes that far
            x, probs = pairs * row, pairs * self.w
            self.add("experts", "counts", "all-gather", "ep_etp", forward * n * 8 * model.num_experts)
            self.add(
                "experts", "experts", "all-to-all", "ep", 2 * (forward + backward) * x + (forward + backward) * probs
            )
            if sizes["etp"] > 1:
                size = sizes["etp"] * ((forward + backward) * (2 * x + probs))
                self.add("experts", "experts", "exchange", "etp", size)

    def _ends(self) -> None:
        """Embedding, output layer and loss."""
        x, losses = self.m * self.whole * self.model.hidden_size * self.a, self.m * self.whole * self.w
        if self.chunks[0].has_embedding:
            self.add_region("embedding", gathered=x, scattered=x, reduced=x)
        if self.chunks[-1].has_output:
            self.add_region("output layer", gathered=2 * x, scattered=x, reduced=x)
            self.add("TP", "cross entropy", "all-reduce", "tp", 3 * losses)
            self.add("control", "tokens of the loss", "all-reduce", "cp", self.m * self.step.loss_mask_bytes)

    def _pipeline(self) -> None:
        """Hidden states to the next stage, gradients to the one before, of every chunk."""
        x = self.m * self.T * self.model.hidden_size * self.a
        chunks, first, last = len(self.chunks), self.pp_rank == 0, self.pp_rank == len(self.stages) - 1
        if len(self.stages) > 1:
            self.add("PP", "hidden states", "send", "pp_forward_out", (chunks - last) * x)
            self.add("PP", "their gradients", "send", "pp_backward_out", (chunks - first) * x)

    def _gradients(self) -> None:
        """Of the whole step: over replicas, and over the ranks that each saw a slice of the sequence."""
        parallel, dtype = self.step.parallel, self.model.dtype
        reduced = self.a if parallel.grad_reduce_in_bf16 and dtype == torch.bfloat16 else self.w
        parameters = [p for chunk in self.chunks for p in self._parameters(chunk)]
        for is_expert, group in ((False, "dp_cp"), (True, "edp")):
            sizes = [elements for row, elements in reversed(parameters) if row.is_expert == is_expert]
            elements = padded_elements(sizes, self.sizes[group], parallel.bucket_size(self.sizes[group]))
            what = "expert" if is_expert else "dense"
            if parallel.use_distributed_optimizer:
                self.add("DP", f"{what} gradients", "reduce-scatter", group, elements * reduced)
                self.add("DP", f"{what} parameters", "all-gather", group, elements * self.a)
            else:
                self.add("DP", f"{what} gradients", "all-reduce", group, elements * reduced)
        if self.sequence_parallel:
            shards = self.sizes["dp_cp"] if parallel.use_distributed_optimizer else 1
            partial = sum(elements for row, elements in parameters if row.partition_dim is None)
            self.add("TP", "gradients of norms and routers", "all-reduce", "tp", partial * reduced / shards)

    def _parameters(self, stage: Stage) -> Iterator[tuple[WeightRule, int]]:
        """Those of a stage in the order of the model, each with its elements on a rank."""
        sizes, table = self.sizes, mixtral_table(self.model, self.model.padded_vocab_size(self.sizes["tp"]))
        for row, _ in table.of_stage(stage):
            stacked = self.model.num_experts // sizes["ep"] if row.is_expert else 1
            yield row, stacked * math.prod(row.part_shape(sizes["etp" if row.is_expert else "tp"]))


def padded_elements(sizes: list[int], ranks: int, bucket_size: int | None) -> int:
    """Elements of the buckets of parameters of these sizes, each aligned, each bucket cut into equal aligned shards."""
    total = bucket = 0
    for number, size in enumerate(sizes, start=1):
        bucket = -(-(bucket + size) // ALIGNMENT) * ALIGNMENT
        if number == len(sizes) or (bucket_size is not None and bucket >= bucket_size):
            total += -(-bucket // (ALIGNMENT * ranks)) * ALIGNMENT * ranks
            bucket = 0
    return total
