"""Steps whose gradients are not finite change nothing; the learning rate and the record follow."""

from types import SimpleNamespace

import pytest
import torch
from model_testing import step_batches, tiny_arguments, train_tiny

import pretrain_gpt
from megatron.core.parallel_state import ProcessGroups
from megatron.training.progress import Progress
from megatron.training.setup import build_trainer
from megatron.training.training import _save, train_step


def test_a_step_with_nan_gradients_is_skipped() -> None:
    trainer = build_trainer(
        tiny_arguments(), ProcessGroups(), torch.device("cpu"), pretrain_gpt.model_provider,
        pretrain_gpt.forward_step,
    )  # fmt: skip
    progress = Progress()
    train_step(trainer, iter(step_batches(0, 0, 1)), progress)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    poisoned = step_batches(1, 0, 1)
    poisoned[2]["loss_mask"] = poisoned[2]["loss_mask"].clone()
    poisoned[2]["loss_mask"][0, 0] = float("nan")
    record, _ = train_step(trainer, iter(poisoned), progress)
    assert record.skipped and progress == Progress(2, 16, 8, 1)
    for parameter, value in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    record, _ = train_step(trainer, iter(step_batches(2, 0, 1)), progress)
    assert not record.skipped and progress == Progress(3, 24, 16, 1)
    assert record.learning_rate == trainer.schedule.learning_rate(8)


def test_a_growing_batch_has_the_gradients_of_its_size() -> None:
    """Those of the auxiliary losses as well, which are attached inside the model."""
    growing = train_tiny(0, 1, {"rampup_batch_size": (4, 4, 100)}, "float64", 1)
    small = train_tiny(0, 1, {"global_batch_size": 4}, "float64", 1)
    for name, (gradient, *_) in small.gradients.items():
        assert torch.equal(growing.gradients[name][0], gradient), name


def test_routers_get_the_expert_shares_of_the_step_before() -> None:
    trainer = build_trainer(
        tiny_arguments(settings={"moe_router_load_balancing_type": "global_aux_loss"}), ProcessGroups(),
        torch.device("cpu"), pretrain_gpt.model_provider, pretrain_gpt.forward_step,
    )  # fmt: skip
    progress = Progress()
    routers = [layer.mlp.router for layer in trainer.model[0].decoder.layers]
    first, _ = train_step(trainer, iter(step_batches(0, 0, 1)), progress)
    assert all(router.expert_share is None for router in routers)
    train_step(trainer, iter(step_batches(1, 0, 1)), progress)
    for router, counts in zip(routers, first.averages.tokens_per_expert, strict=True):
        assert router.expert_share.tolist() == pytest.approx([count / sum(counts) for count in counts])


def test_parameters_have_arrived_before_they_are_saved() -> None:
    calls: list[str] = []
    buffers = SimpleNamespace(wait_for_parameters=lambda: calls.append("wait"))
    trainer = SimpleNamespace(buffers=buffers, model=None, optimizer=None)
    _save(SimpleNamespace(save=lambda *_: calls.append("save")), trainer, Progress())  # type: ignore[arg-type]
    assert calls == ["wait", "save"]
