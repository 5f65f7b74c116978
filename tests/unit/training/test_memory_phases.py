"""What every phase of a run has alive on a CPU, where tensors have values, against what a dry run says of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_testing import run_distributed
from memory_testing import Counted, CudaMemory, PhaseCounter, TensorMemory, count_phases, problems

import pretrain_gpt
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.training import evaluation
from megatron.training.arguments import parse_arguments
from megatron.training.config import Arguments
from megatron.training.dry_run import DryRun, dry_run
from megatron.training.loader import Batch
from megatron.training.microbatches import run_microbatches
from megatron.training.setup import Trainer

CPU = torch.device("cpu")
MODEL = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --num-query-groups 2 "
    "--vocab-size 256 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --bf16 --train-iters 2 "
    "--tokenizer-type NullTokenizer --mock-data --eval-iters 2 --device cpu"
)
DENSE = f"{MODEL} --num-experts 2 --moe-router-topk 2"
MOE = f"{MODEL} --num-experts 8"


TWO_RANKS = {
    "TP2": f"{MOE} --global-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel",
    "EP2 with ZeRO-1": f"{MOE} --global-batch-size 4 --expert-model-parallel-size 2 --use-distributed-optimizer",
    "PP2": f"{MOE} --global-batch-size 4 --pipeline-model-parallel-size 2",
    "full recomputation, bf16 gradients": f"{MOE} --global-batch-size 4 --recompute-granularity full "
    "--grad-reduce-in-bf16",
}


def _arguments(flags: str, rank: int = 0, world_size: int = 1) -> Arguments:
    return parse_arguments([*flags.split(), "--dry-run", f"{rank}/{world_size}"])[0]


def _predicted(flags: str, rank: int = 0, world_size: int = 1) -> DryRun:
    return dry_run(_arguments(flags, rank, world_size), pretrain_gpt.model_provider, pretrain_gpt.forward_step)


def _random_batches(seed: int, length: int, device: torch.device) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, 256, (1, length), generator=generator).to(device)
        yield {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, length, device=device)}


def _count(rank: int, world_size: int, flags: str, folder: str) -> Counted:
    """One rank's; weights and tokens are random, so that the experts get about the same number of tokens."""
    arguments = _arguments(flags, rank, world_size)

    def source() -> Iterator[Batch]:
        return _random_batches(rank, 64, CPU)

    with TensorMemory() as memory:
        groups = build_process_groups(arguments.parallel, rank, world_size) if world_size > 1 else ProcessGroups()
        counter = PhaseCounter(arguments, groups, CPU, memory)
        return count_phases(counter, source, Path(folder), (("sharded", False),), drawn_on_device=True)


def test_phases_take_what_the_dry_run_says(tmp_path: Path) -> None:
    counted = _count(0, 1, f"{MOE} --global-batch-size 2", str(tmp_path))
    assert {"buffers", "build", "warm-up", "step", "evaluation", "save sharded", "load sharded"} <= set(counted.peaks)
    assert problems(counted, _predicted(f"{MOE} --global-batch-size 2")) == []


@pytest.mark.slow
def test_phases_of_a_model_that_is_dense(tmp_path: Path) -> None:
    """Every token goes to both experts."""
    assert problems(_count(0, 1, DENSE, str(tmp_path)), _predicted(DENSE)) == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", TWO_RANKS.values(), ids=TWO_RANKS)
def test_phases_on_two_ranks(flags: str, tmp_path: Path) -> None:
    for rank, counted in enumerate(run_distributed(_count, 2, flags, str(tmp_path))):
        assert problems(counted, _predicted(flags, rank, 2)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("more", ["", "--recompute-granularity full"])
def test_phases_on_a_gpu(more: str, tmp_path: Path) -> None:
    """350 million parameters, next to which the workspaces of cuBLAS are small."""
    wide = MODEL.replace("hidden-size 128", "hidden-size 1024").replace("ffn-hidden-size 384", "ffn-hidden-size 3584")
    long = wide.replace("seq-length 64", "seq-length 512").replace("embeddings 64", "embeddings 512")
    flags = f"{long.replace('device cpu', 'device cuda')} --num-experts 8 {more}"
    device = torch.device("cuda", 0)
    torch.ones(64, 64, device=device, dtype=torch.bfloat16).mm(torch.ones(64, 64, device=device, dtype=torch.bfloat16))
    counter = PhaseCounter(_arguments(flags), ProcessGroups(), device, CudaMemory())
    formats = ("sharded", False), ("sharded", True), ("torch", False)
    counted = count_phases(counter, lambda: _random_batches(0, 512, device), tmp_path, formats)
    assert problems(counted, _predicted(flags)) == []


@pytest.mark.slow
def test_a_planted_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is built with memory of its own; loading keeps a temporary tensor; an evaluation keeps one, too."""
    kept = []
    finish_loading = MixedPrecisionOptimizer.finish_loading

    def and_keep(optimizer: MixedPrecisionOptimizer, scalars: dict[str, float]) -> None:
        kept.append([bucket.weights.clone() for bucket in optimizer.buffers.buckets])
        finish_loading(optimizer, scalars)

    def evaluate_and_keep(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
        kept.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        return run_microbatches(trainer, *arguments, **options)

    monkeypatch.setattr(
        pretrain_gpt, "MixtralModel", lambda *arguments, allocate, **options: MixtralModel(*arguments, **options)
    )
    monkeypatch.setattr(MixedPrecisionOptimizer, "finish_loading", and_keep)
    monkeypatch.setattr(evaluation, "run_microbatches", evaluate_and_keep)
    flags = f"{MOE} --global-batch-size 2"
    counted = _count(0, 1, flags, str(tmp_path))
    monkeypatch.undo()
    found = {problem.partition(":")[0] for problem in problems(counted, _predicted(flags))}
    assert {"buffers", "evaluation", "load sharded"} <= found
