"""Buckets, their overlap with the passes, the distributed optimizer, and the memory of a rank."""

import gc
from typing import Any

import pytest
import torch
from distributed_testing import run_distributed
from model_testing import StepOutcome, step_batches, tiny_arguments, train_tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pretrain_gpt
from megatron.core.config import ParallelConfig
from megatron.core.distributed.gradient_buffers import Bucket, GradientBuffers, main_grad
from megatron.core.optimizer import offload
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_scheduler import StepRates
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.tensor_parallel.parameter import ParameterSpec, Placement, new_parameter
from megatron.training.progress import Progress
from megatron.training.setup import build_trainer
from megatron.training.training import train_step

AWARE = {"use_precision_aware_optimizer": True}
REMAINDERS = AWARE | {"main_params_dtype": "bf16-remainder"}
MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
CPU = torch.device("cpu")
ZERO = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "ddp_bucket_size": 2000}
VARIANTS: dict[str, dict[str, Any]] = {
    "overlap": OVERLAP,
    "zero": ZERO,
    "zero_overlap": ZERO | OVERLAP | {"overlap_param_gather": True},
    "zero_large_buckets": ZERO | OVERLAP | {"overlap_param_gather": True, "ddp_bucket_size": 30000},
}


OFFLOAD = {"optimizer_cpu_offload": True, "no_pin_cpu_grads": True, "no_pin_cpu_params": True}
HALF = OFFLOAD | {"optimizer_offload_fraction": 0.5}
OFFLOADED = [OFFLOAD, VARIANTS["zero_overlap"] | HALF]


def _train_all(rank: int, world_size: int, variants: list[dict[str, Any]]) -> list[StepOutcome]:
    """Each variant; state on the host is updated through copies, as from a GPU."""
    offload.new_copies = lambda device: offload.ImmediateCopies()
    offload.PIECE = 4096
    # without clipping, since the norm's last bits depend on how its terms are grouped
    return [train_tiny(rank, world_size, settings | {"clip_grad": 0.0}, "bfloat16", 3) for settings in variants]


def test_all_ways_give_the_same_bits_in_bf16() -> None:
    """With two ranks; the order in which more ranks' gradients are summed is the communication library's."""
    bf16 = {"grad_reduce_in_bf16": True}
    ways = [*VARIANTS.values(), *OFFLOADED]
    runs = [{}, *ways, bf16, *(settings | bf16 for settings in ways)]
    for outcomes in run_distributed(_train_all, 2, runs):
        middle = len(runs) // 2
        for theirs, variants in ((outcomes[0], outcomes[1:middle]), (outcomes[middle], outcomes[middle + 1 :])):
            for ours in variants:
                assert [step["lm_loss"] for step in ours.numbers] == [step["lm_loss"] for step in theirs.numbers]
                for step, expected in zip(ours.numbers, theirs.numbers, strict=True):
                    assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
                for key, (weight, *_) in theirs.weights.items():
                    assert torch.equal(ours.weights[key][0], weight), key
        assert outcomes[middle].weights.keys() == outcomes[0].weights.keys()
        assert any(
            not torch.equal(outcomes[middle].weights[key][0], outcomes[0].weights[key][0]) for key in theirs.weights
        )


def _bytes_alive() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _memory(rank: int, world_size: int, cases: list[tuple[dict[str, Any], str]]) -> list[float]:
    return [_bytes_a_parameter(rank, world_size, *case) for case in cases]


def _bytes_a_parameter(rank: int, world_size: int, settings: dict[str, Any], params_dtype: str) -> float:
    """What model, gradients and optimizer hold after two steps."""
    arguments = tiny_arguments(params_dtype, settings)
    groups = build_process_groups(arguments.parallel, rank, world_size) if world_size > 1 else ProcessGroups()
    before = _bytes_alive()
    trainer = build_trainer(arguments, groups, CPU, pretrain_gpt.model_provider, pretrain_gpt.forward_step)
    for step in range(2):
        train_step(trainer, iter(step_batches(step, groups.dp.rank, groups.dp.size)), Progress())
    trainer.buffers.wait_for_parameters()
    return (_bytes_alive() - before) / sum(p.numel() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (
            1,
            [
                ({}, "bfloat16", 2 + 4 + 12),
                ({}, "float32", 4 + 4 + 8),
                (REMAINDERS | {"main_grads_dtype": "bf16"} | MOMENTS, "bfloat16", 2 + 2 + 2 + 2 + 2),
                (REMAINDERS | {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}, "bfloat16", 2 + 4 + 2 + 3 + 2 / 64),
                (AWARE | MOMENTS, "float32", 4 + 4 + 4),
            ],
        ),
        (
            2,
            [
                ({}, "bfloat16", 2 + 4 + 12),
                (ZERO, "bfloat16", 2 + 4 + 12 / 2),
                (ZERO | {"grad_reduce_in_bf16": True}, "bfloat16", 2 + 2 + 12 / 2),
                (ZERO, "float32", 4 + 4 + 8 / 2),
                (ZERO | REMAINDERS | MOMENTS, "bfloat16", 2 + 4 + 6 / 2),
            ],
        ),
        pytest.param(4, [(VARIANTS["zero_overlap"], "bfloat16", 2 + 4 + 12 / 4)], marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_rank(world_size: int, cases: list[tuple[dict[str, Any], str, float]]) -> None:
    expected = [bytes_a_parameter for _, _, bytes_a_parameter in cases]
    for used in run_distributed(_memory, world_size, [case[:2] for case in cases]):
        assert used == pytest.approx(expected, rel=0.03)


class _Toy(nn.Module):
    """Four matrices in a row; the third is used only where the input says so, as an expert without tokens is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_ToyLayer(nested=number == 2) for number in range(4))

    def forward(self, x: Tensor, recompute: str = "") -> Tensor:
        unused = 2 if x[0, 0] < 0 else None
        for number, layer in enumerate(self.layers):
            if number == unused:
                continue
            x = x.abs() + (checkpoint(layer, x, use_reentrant=recompute == "reentrant") if recompute else layer(x))
        return x.square().mean()


class _ToyLayer(nn.Module):
    """Its matrix may be in a module that has no forward pass, as those of experts are."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.matrix = nn.Module() if nested else None
        holder = self.matrix if self.matrix is not None else self
        holder.weight = new_parameter(ParameterSpec(global_shape=(8, 8)), Placement(dtype=torch.float64, device=CPU))
        nn.init.normal_(holder.weight, generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ next(self.parameters())


def _toy_inputs(rank: int, step: int) -> list[Tensor]:
    """Three microbatches, some of which leave the third matrix without a gradient: in step 1 all of rank 1."""
    inputs = list(torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)))
    unused = [(0, 0), (2, 1)] if step == 0 else [(0, 0), (0, 1), (1, 1), (2, 1)]
    for number, x in enumerate(inputs):
        x[0, 0] = -1 if (number, rank) in unused else 1
    return inputs


def _toy_runs(rank: int, world_size: int) -> list[tuple[list[Tensor], Any]]:
    overlap = {"overlap_grad_reduce": True, "ddp_bucket_size": 64}
    runs = [({}, ""), (overlap, ""), (overlap, "reentrant"), (overlap, "not_reentrant")]
    return [_toy_gradients(rank, world_size, *run) for run in runs]


def _toy_gradients(rank: int, world_size: int, settings: dict[str, Any], recompute: str) -> tuple[list[Tensor], Any]:
    """Gradients, and the buckets whose reduction has begun when each microbatch reaches the first matrix."""
    parallel = ParallelConfig(**settings)
    groups = build_process_groups(parallel, rank, world_size)
    model = _Toy()
    buffers = GradientBuffers(model, groups, parallel)
    launched: list[list[int]] = []
    model.layers[0].weight.register_post_accumulate_grad_hook(lambda _: launched[-1].append(buffers._launched))
    for step in range(2):
        launched.append([])
        buffers.start_step(3)
        for x in _toy_inputs(rank, step):
            (model(x.requires_grad_(bool(recompute)), recompute) / 3).backward()
        buffers.finalize()
    return [main_grad(parameter).clone() for parameter in model.parameters()], launched


def test_reduction_starts_in_the_last_backward_and_tolerates_missing_gradients() -> None:
    model = _Toy()
    (sum(model(x) for rank in range(2) for x in _toy_inputs(rank, 1)) / 6).backward()
    for (plain, launched), *overlapped in run_distributed(_toy_runs, 2):
        assert launched == [[0, 0, 0]] * 2
        for _, launched in overlapped:
            # Rank 0 misses a gradient of the third matrix in the first, rank 1 in the last microbatch: both keep it,
            # and all after it, for the end.
            assert launched == [[0, 0, 1]] * 2
        for gradients in (plain, *(gradients for gradients, _ in overlapped)):
            for gradient, parameter in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-13, atol=0)


def _gathers(rank: int, world_size: int) -> list[list[bool]]:
    """Before each layer's forward pass: which layers' parameters are still under way."""
    parallel = ParallelConfig(**VARIANTS["zero_overlap"] | {"ddp_bucket_size": 64})
    groups = build_process_groups(parallel, rank, world_size)
    model = _Toy()
    buffers = GradientBuffers(model, groups, parallel)
    optimizer = MixedPrecisionOptimizer(buffers, AdamW(OptimizerConfig()), OptimizerConfig(), groups)
    buffers.start_step(1)
    model(_toy_inputs(0, 0)[1]).backward()
    buffers.finalize()
    assert optimizer.step(StepRates(0.1, 0.1, 0.0)).updated
    seen: list[list[bool]] = []

    def look(module: nn.Module, inputs: Any) -> None:
        seen.append([bool(bucket.work) for bucket in reversed(buffers.buckets)])

    for layer in model.layers:
        layer.register_forward_pre_hook(look)
    buffers.start_step(1)
    model(_toy_inputs(0, 0)[1])
    return seen


def test_while_a_layer_works_the_parameters_of_the_next_one_are_under_way() -> None:
    for seen in run_distributed(_gathers, 2):
        assert seen == [[number == layer + 1 for number in range(4)] for layer in range(4)]


POISONED = [
    (VARIANTS["zero_overlap"], float("nan"), False),
    (VARIANTS["zero"], float("-inf"), True),
    ({"pipeline_model_parallel_size": 2}, float("nan"), True),
    ({"tensor_model_parallel_size": 2}, float("inf"), False),
]


def _poisoned_steps(rank: int, world_size: int) -> list[tuple[bool, bool]]:
    return [_poisoned_step(rank, world_size, *case) for case in POISONED]


def _poisoned_step(
    rank: int, world_size: int, settings: dict[str, Any], poison: float, expert: bool
) -> tuple[bool, bool]:
    """Whether a step with one bad gradient element on rank 1 was skipped, and left every tensor as it was."""
    arguments = tiny_arguments("bfloat16", settings)
    groups = build_process_groups(arguments.parallel, rank, world_size)
    trainer = build_trainer(arguments, groups, CPU, pretrain_gpt.model_provider, pretrain_gpt.forward_step)
    progress = Progress()
    train_step(trainer, iter(step_batches(0, groups.dp.rank, groups.dp.size)), progress)
    trainer.buffers.wait_for_parameters()

    def state() -> list[Tensor]:
        pieces = [tensor for piece in trainer.optimizer.state_pieces() for tensor in piece.tensors.values()]
        return [tensor.detach().clone() for tensor in [*trainer.model.parameters(), *pieces]]

    before = state()
    target = next(p for p in trainer.model.parameters() if p.spec.is_expert == expert)
    reduce = trainer.buffers._reduce

    def reduce_poisoned(bucket: Bucket) -> None:
        if rank == 1 and any(parameter is target for parameter in bucket.parameters):
            main_grad(target).view(-1)[5] = poison
        reduce(bucket)

    trainer.buffers._reduce = reduce_poisoned  # type: ignore[method-assign]
    record, _ = train_step(trainer, iter(step_batches(1, groups.dp.rank, groups.dp.size)), progress)
    unchanged = all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    return record.skipped, unchanged


def test_one_bad_gradient_is_skipped_by_all() -> None:
    assert run_distributed(_poisoned_steps, 2) == [[(True, True)] * len(POISONED)] * 2
