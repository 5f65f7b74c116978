"""What makes the products of the experts: measured once, the same on all ranks, and kept by a run that resumes."""

from pathlib import Path

import pytest
import torch
from checkpoint_testing import save
from distributed_testing import run_distributed
from model_testing import step_batches, tiny_arguments

import pretrain_gpt
from megatron.core.config import ParallelConfig
from megatron.core.fusions.linear import Backend
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.transformer.moe.experts import Experts
from megatron.training.checkpoints.source import load_checkpoint, locate_checkpoint
from megatron.training.grouped_gemm import choose, resolve_grouped_gemm, rows_per_expert
from megatron.training.progress import Progress, RunRecord
from megatron.training.setup import Trainer, build_trainer
from megatron.training.training import train_step

SECONDS = {"grouped_mm": 2.0, "loop": 1.0}


def _trainer(settings: dict[str, object] | None = None, groups: ProcessGroups | None = None) -> Trainer:
    return build_trainer(
        tiny_arguments("float32", settings), groups or ProcessGroups(), torch.device("cpu"),
        pretrain_gpt.model_provider, pretrain_gpt.forward_step,
    )  # fmt: skip


def _choose(trainer: Trainer, known: dict[str, str], seconds: dict[str, float]) -> tuple[dict[str, str], str]:
    experts = [module for module in trainer.model.modules() if isinstance(module, Experts)]
    chosen, line = choose(trainer, known, experts, lambda backend, _, rows: seconds[backend] * rows / 1000)
    assert {module.backend for module in experts} == set(chosen.values())
    return chosen, line


def test_the_faster_one_is_taken_by_all_layers() -> None:
    trainer = _trainer()
    (what,) = _choose(trainer, {}, {"grouped_mm": 2.0, "loop": 1.0})[0]
    assert _choose(trainer, {}, {"grouped_mm": 2.0, "loop": 1.0})[0] == {what: "loop"}
    assert _choose(trainer, {}, {"grouped_mm": 1.0, "loop": 2.0})[0] == {what: "grouped_mm"}
    assert _choose(trainer, {}, {"grouped_mm": 1.0, "loop": 0.9})[0] == {what: "grouped_mm"}, "too close to tell"
    # 2 x 16 tokens, 2 experts each, 4 experts: 16 rows
    line = _choose(trainer, {}, {"grouped_mm": 1.0, "loop": 2.0})[1]
    assert "4 experts of 16 rows, 48 x 32, float32, on cpu: grouped_mm, from grouped_mm 16 ms, loop 32 ms" in line


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_a_resumed_run_computes_as_before(tmp_path: Path, ckpt_format: str) -> None:
    """Although it would measure otherwise now."""
    settings = {"save": str(tmp_path), "load": str(tmp_path), "ckpt_format": ckpt_format}

    def steps(trainer: Trainer, progress: Progress, number: int) -> None:
        for step in range(progress.iteration, progress.iteration + number):
            train_step(trainer, iter(step_batches(step, 0, 1)), progress)

    whole, progress = _trainer(settings), Progress()
    chosen, _ = _choose(whole, {}, {"grouped_mm": 1.0, "loop": 2.0})
    assert list(chosen.values()) == ["grouped_mm"]
    steps(whole, progress, 1)
    save(whole, progress, RunRecord(grouped_gemm=chosen))
    steps(whole, progress, 2)

    resumed = _trainer(settings)
    progress, record, _ = load_checkpoint(locate_checkpoint(resumed.arguments, resumed.groups), resumed)
    again, line = _choose(resumed, record.grouped_gemm, {"grouped_mm": 2.0, "loop": 1.0})
    assert again == chosen == record.grouped_gemm and line.endswith("grouped_mm, as measured when the run began")
    steps(resumed, progress, 2)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # other shapes are another question
    other = _trainer(settings | {"micro_batch_size": 4})
    assert list(_choose(other, chosen, {"grouped_mm": 2.0, "loop": 1.0})[0].values()) == ["loop"]


def _on_two_ranks(rank: int, world_size: int) -> tuple[dict[str, str], str]:
    groups = build_process_groups(ParallelConfig(), rank, world_size)
    # the second rank is the slow one of the loop, and alone it would choose otherwise than the first
    seconds = ({"grouped_mm": 2.0, "loop": 1.0}, {"grouped_mm": 2.5, "loop": 3.0})[rank]
    return _choose(_trainer(groups=groups), {}, seconds)


def test_all_ranks_take_what_suits_the_slowest() -> None:
    first, second = run_distributed(_on_two_ranks, 2)
    assert first == second and list(first[0].values()) == ["grouped_mm"] and "grouped_mm 40 ms, loop 48 ms" in first[1]


def test_a_flag_or_a_cpu_leave_nothing_to_measure() -> None:
    def never(backend: Backend, experts: Experts, rows: int) -> float:
        raise AssertionError(backend)

    for flag in ("auto", "loop", "grouped_mm"):
        trainer, known = _trainer({"moe_grouped_gemm_backend": flag}), {"before": "loop"}
        assert resolve_grouped_gemm(trainer, known, never) == known
        assert {module.backend for module in trainer.model.modules() if isinstance(module, Experts)} == {flag}
    with pytest.raises(ValueError, match=r"grouped_mm does not take experts of float32, 46 x 32 .*leave it at auto"):
        _trainer({"moe_grouped_gemm_backend": "grouped_mm", "ffn_hidden_size": 46})


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 16),  # 32 tokens x 2 / 4
        ({"expert_model_parallel_size": 2}, 32),  # those of two ranks
        ({"tensor_model_parallel_size": 2}, 16),  # each expert is split, its tokens are not
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1,
          "expert_model_parallel_size": 2}, 16),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1,
          "expert_model_parallel_size": 4}, 32),
        ({"context_parallel_size": 2}, 8),
    ],
)  # fmt: skip
def test_rows_of_an_expert(settings: dict[str, object], rows: int) -> None:
    assert rows_per_expert(tiny_arguments("float32", settings)) == rows
