"""What makes the products of the experts: measured once, the same on all ranks, and kept by a run that resumes."""

from pathlib import Path

import pytest
import torch
from checkpoint_testing import save
from distributed_testing import run_distributed
from model_testing import step_batches, tiny_arguments

import pretrain_gpt
from megatron.core.config import ParallelConfig
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.transformer.moe.experts import Experts
from megatron.training import grouped_gemm
from megatron.training.checkpoints.source import load_checkpoint, locate_checkpoint
from megatron.training.grouped_gemm import PRODUCTS, WEIGHT_GRADIENTS, Choice, choose, rows_per_expert
from megatron.training.grouped_gemm import resolve_grouped_gemm as resolve
from megatron.training.initialize import SharedError
from megatron.training.progress import Progress, RunRecord
from megatron.training.setup import Trainer, build_trainer
from megatron.training.training import train_step


def _trainer(settings: dict[str, object] | None = None, groups: ProcessGroups | None = None) -> Trainer:
    return build_trainer(
        tiny_arguments("float32", settings), groups or ProcessGroups(), torch.device("cpu"),
        pretrain_gpt.model_provider, pretrain_gpt.forward_step,
    )  # fmt: skip


def _experts(trainer: Trainer) -> list[Experts]:
    return [module for module in trainer.model.modules() if isinstance(module, Experts)]


def _choose(
    trainer: Trainer, known: dict[str, str], seconds: dict[str, float], choice: Choice = PRODUCTS
) -> tuple[set[str], str]:
    """The backends of all experts, and the line; what was chosen goes into `known`."""
    timed = choice._replace(measure=lambda backend, _, rows: seconds[backend] * rows / 1000)
    chosen, line = choose(trainer, known, _experts(trainer), timed)
    known |= chosen
    return {getattr(module, choice.attribute) for module in _experts(trainer)}, line


def test_the_faster_one_is_taken_by_all_layers() -> None:
    trainer = _trainer()
    assert _choose(trainer, {}, {"grouped_mm": 2.0, "loop": 1.0})[0] == {"loop"}
    assert _choose(trainer, {}, {"grouped_mm": 1.0, "loop": 2.0})[0] == {"grouped_mm"}
    assert _choose(trainer, {}, {"grouped_mm": 1.0, "loop": 0.9})[0] == {"grouped_mm"}, "too close to tell"
    # 2 x 16 tokens, 2 experts each, 4 experts: 16 rows
    line = _choose(trainer, {}, {"grouped_mm": 1.0, "loop": 2.0})[1]
    assert "4 experts of 16 rows, 48 x 32, float32, on cpu: grouped_mm, from grouped_mm 16 ms, loop 32 ms" in line


@pytest.mark.parametrize("ckpt_format", ["sharded", "torch"])
def test_a_resumed_run_computes_as_before(tmp_path: Path, ckpt_format: str) -> None:
    """Although it would measure otherwise now."""
    settings = {"save": str(tmp_path), "load": str(tmp_path), "ckpt_format": ckpt_format}

    def steps(trainer: Trainer, progress: Progress, number: int) -> None:
        for step in range(progress.iteration, progress.iteration + number):
            train_step(trainer, iter(step_batches(step, 0, 1)), progress)

    whole, progress, chosen = _trainer(settings), Progress(), dict[str, str]()
    assert _choose(whole, chosen, {"grouped_mm": 1.0, "loop": 2.0})[0] == {"grouped_mm"}
    steps(whole, progress, 1)
    save(whole, progress, RunRecord(grouped_gemm=chosen))
    steps(whole, progress, 2)

    resumed = _trainer(settings)
    progress, record, _ = load_checkpoint(locate_checkpoint(resumed.arguments, resumed.groups), resumed)
    assert record.grouped_gemm == chosen
    backends, line = _choose(resumed, record.grouped_gemm, {"grouped_mm": 2.0, "loop": 1.0})
    assert backends == {"grouped_mm"} and line.endswith("grouped_mm, as measured when the run began")
    steps(resumed, progress, 2)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # other shapes are another question
    other = _trainer(settings | {"micro_batch_size": 4})
    assert _choose(other, chosen, {"grouped_mm": 2.0, "loop": 1.0})[0] == {"loop"}


def test_a_flag_or_a_cpu_leave_nothing_to_measure() -> None:
    def never(backend: str, experts: Experts, rows: int) -> float:
        raise AssertionError(backend)

    choices = [choice._replace(measure=never) for choice in (PRODUCTS, WEIGHT_GRADIENTS)]
    for flag, wgrad in (("auto", "auto"), ("loop", "tiles"), ("grouped_mm", "auto")):
        trainer = _trainer({"moe_grouped_gemm_backend": flag, "moe_grouped_wgrad_backend": wgrad})
        assert resolve(trainer, {"before": "loop"}, choices) == {"before": "loop"}
        assert {(module.backend, module.wgrad_backend) for module in _experts(trainer)} == {(flag, wgrad)}
    with pytest.raises(ValueError, match=r"grouped_mm does not take experts of float32, 46 x 32 .*leave it at auto"):
        _trainer({"moe_grouped_gemm_backend": "grouped_mm", "ffn_hidden_size": 46})


def test_weight_gradients_are_another_choice_in_the_same_record() -> None:
    trainer, known = _trainer(), dict[str, str]()
    _choose(trainer, known, {"grouped_mm": 1.0, "loop": 2.0})
    kernels, line = _choose(trainer, known, {"tiles": 2.0, "persistent": 1.9}, WEIGHT_GRADIENTS)
    assert kernels == {"tiles"}, "too close to tell"
    kernels, line = _choose(trainer, {}, {"tiles": 2.0, "persistent": 1.0}, WEIGHT_GRADIENTS)
    assert kernels == {"persistent"}
    shape = "weight gradients of 4 experts of 16 rows, 48 x 32, float32, on cpu"
    assert line == f"{shape}: persistent, from tiles 32 ms, persistent 16 ms"
    assert sorted(known.values()) == ["grouped_mm", "tiles"]
    resumed = _trainer()
    kernels, line = _choose(resumed, known, {"tiles": 2.0, "persistent": 1.0}, WEIGHT_GRADIENTS)
    assert kernels == {"tiles"} and line.endswith(": tiles, as measured when the run began")
    assert {module.backend for module in _experts(resumed)} == {"auto"}, "products are another question"


def _resolve(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured where the persistent kernel is there."""
    measured: list[str] = []

    def measure(backend: str, experts: Experts, rows: int) -> float:
        measured.append(backend)
        return {"tiles": 2.0, "persistent": 1.0}[backend]

    monkeypatch.setattr(grouped_gemm, "takes_persistent", lambda weight, out: out.dtype == torch.float32)
    resolve(trainer, {}, [choice._replace(measure=measure) for choice in (PRODUCTS, WEIGHT_GRADIENTS)])
    return measured


def test_kernels_of_weight_gradients_are_measured_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer()
    assert _resolve(trainer, monkeypatch) == ["tiles", "persistent"]
    assert {module.wgrad_backend for module in _experts(trainer)} == {"persistent"}
    for settings in ({"moe_grouped_wgrad_backend": "tiles"}, {"deterministic_mode": True}):
        trainer = _trainer(settings)
        assert _resolve(trainer, monkeypatch) == []
        assert "persistent" not in {module.wgrad_backend for module in _experts(trainer)}
    trainer = _trainer({"moe_grouped_wgrad_backend": "persistent"})
    assert _resolve(trainer, monkeypatch) == []
    assert {module.wgrad_backend for module in _experts(trainer)} == {"persistent"}


def test_what_is_measured_leaves_no_trace_in_a_step() -> None:
    """Main gradients are where it adds to."""
    steps = []
    for measures in (False, True):
        trainer = _trainer()
        if measures:
            seconds = [WEIGHT_GRADIENTS.measure(kernel, _experts(trainer)[0], 3) for kernel in ("tiles", "persistent")]
            assert min(seconds) > 0
        train_step(trainer, iter(step_batches(0, 0, 1)), Progress())
        steps.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*steps, strict=True))


def test_a_kernel_that_is_not_here_is_refused() -> None:
    sentence = (
        r"--moe-grouped-wgrad-backend persistent does not take experts of 48 x 32 in torch.float32 with gradients in "
        r"torch.float32 on cpu: it wants an H100 or B200 .* so leave it at auto"
    )
    with pytest.raises(SharedError, match=sentence):
        resolve(_trainer({"moe_grouped_wgrad_backend": "persistent"}), {})


def _on_two_ranks(rank: int, world_size: int) -> list[object]:
    groups = build_process_groups(ParallelConfig(), rank, world_size)
    # the second rank is the slow one of the loop, and alone it would choose otherwise than the first
    seconds = ({"grouped_mm": 2.0, "loop": 1.0}, {"grouped_mm": 2.5, "loop": 3.0})[rank]
    found: list[object] = [_choose(_trainer(groups=groups), {}, seconds)]
    with pytest.MonkeyPatch.context() as patch:
        # and its device has one kernel of the weight gradients alone
        patch.setattr(grouped_gemm, "takes_persistent", lambda weight, out: rank == 0)
        trainer = _trainer(groups=groups)
        found += [len(resolve(trainer, {})), {module.wgrad_backend for module in _experts(trainer)}]
        with pytest.raises(SharedError) as refused:
            resolve(_trainer({"moe_grouped_wgrad_backend": "persistent"}, groups), {})
    return [*found, str(refused.value)]


def test_all_ranks_take_what_suits_the_slowest_and_what_all_of_them_have() -> None:
    first, second = run_distributed(_on_two_ranks, 2)
    assert first == second
    (backends, line), measured, kernels, refusal = first
    assert backends == {"grouped_mm"} and "grouped_mm 40 ms, loop 48 ms" in line
    assert measured == 0 and kernels == {"auto"}
    assert refusal.startswith("rank 1: --moe-grouped-wgrad-backend persistent does not take experts")


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
