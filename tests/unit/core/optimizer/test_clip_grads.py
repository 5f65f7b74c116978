"""The norm is precise for buffers of any length, and not finite when it should not be."""

import math

import pytest
import torch
from distributed_testing import run_distributed
from model_testing import step_batches, tiny_arguments

import pretrain_gpt
from megatron.core.distributed.gradient_buffers import main_grad
from megatron.core.optimizer.clip_grads import OwnGradients, gradient_norm
from megatron.core.parallel_state import Group, build_process_groups
from megatron.training.progress import Progress
from megatron.training.setup import build_trainer
from megatron.training.training import train_step


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-5)])
def test_long_buffers(dtype: torch.dtype, bound: float) -> None:
    # one running float32 sum of so many squares is off by 3e-4
    grads = torch.randn(9_000_001, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = grads.double().norm().item()
    assert gradient_norm(OwnGradients([grads[:100], grads[100:]], []), torch.zeros(()), Group()) == pytest.approx(
        expected, rel=bound
    )


def test_a_bad_loss_is_a_bad_norm() -> None:
    grads = OwnGradients([torch.ones(4)], [torch.ones(3)])
    assert gradient_norm(grads, torch.tensor(7.0), Group()) == 2
    assert not math.isfinite(gradient_norm(grads, torch.tensor(math.inf), Group()))
    assert not math.isfinite(gradient_norm(grads, torch.tensor(math.nan), Group()))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("index", [0, 1])
def test_a_bad_gradient_is_a_bad_norm_whoever_counts_it(bad: float, index: int) -> None:
    grads = OwnGradients([torch.ones(4)], [torch.ones(3)])
    grads[index][0][1] = bad
    assert not math.isfinite(gradient_norm(grads, torch.tensor(0.0), Group()))


def _train_with_a_fault(rank: int, world_size: int) -> tuple[bool, bool]:
    """Whether a NaN of the second tensor-parallel rank in a norm's gradient skipped the step and spared the weights."""
    arguments = tiny_arguments("float32", {"tensor_model_parallel_size": 2})
    groups = build_process_groups(arguments.parallel, rank, world_size)
    trainer = build_trainer(
        arguments, groups, torch.device("cpu"), pretrain_gpt.model_provider, pretrain_gpt.forward_step
    )
    finalize = trainer.buffers.finalize

    def finalize_with_fault() -> None:
        finalize()
        if groups.tp.rank == 1:
            norms = [p for name, p in trainer.model.named_parameters() if "input_layernorm" in name]
            main_grad(norms[0])[3] = math.nan

    trainer.buffers.finalize = finalize_with_fault  # type: ignore[method-assign]
    record, _ = train_step(trainer, iter(step_batches(0, 0, 1)), Progress())
    return record.skipped, all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_a_fault_of_one_rank_in_a_replicated_parameter_skips_the_step_everywhere() -> None:
    assert run_distributed(_train_with_a_fault, 2) == [(True, True), (True, True)]
