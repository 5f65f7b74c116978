"""What gradients are multiplied by: the parts make the product, and a step applies each of them once."""

import itertools
from dataclasses import fields

import pytest
import torch
from model_testing import relative_difference, step_batches, tiny_arguments
from torch import Tensor

import pretrain_gpt
from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import ProcessGroups
from megatron.training.progress import Progress
from megatron.training.setup import Trainer, build_trainer
from megatron.training.training import train_step


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_parts_make_the_product(scale: float) -> None:
    for microbatches, dp, cp, tokens, clip in itertools.product((1, 3), (1, 5), (1, 2, 3), (1, 31), (1.0, 0.3)):
        factors = GradientFactors(loss_scale=scale, num_microbatches=microbatches, dp=dp, cp=cp)
        after = factors.update(clip) / factors.replicas
        loss = factors.loss(torch.tensor(tokens, dtype=torch.float64)).item()
        assert factors.total(tokens, clip) == pytest.approx(clip / (dp * microbatches * tokens), rel=1e-14)
        assert loss * after == pytest.approx(factors.total(tokens, clip), rel=1e-14)
        assert factors.auxiliary * after == pytest.approx(factors.total(1, clip), rel=1e-14)


SCALE, MICROBATCHES = 1024.0, 4


def _trainer() -> Trainer:
    arguments = tiny_arguments(settings={"loss_scale": SCALE, "clip_grad": 0.5, "moe_aux_loss_coeff": 3.0})
    provider, step = pretrain_gpt.model_provider, pretrain_gpt.forward_step
    return build_trainer(arguments, ProcessGroups(), torch.device("cpu"), provider, step)


def _gradients(model: MixtralModel, microbatch: Microbatch, tokens: Tensor, weights: Tensor) -> list[Tensor]:
    model.zero_grad()
    (model(tokens, microbatch).tensor * weights).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def _plain_gradients() -> list[tuple[float, list[Tensor], list[Tensor]]]:
    """Of each microbatch of a step: its tokens, the gradients of the sum of their losses and of its auxiliary ones."""
    trainer = _trainer()
    model = pretrain_gpt.model_provider(trainer.arguments, ProcessGroups(), torch.device("cpu"))
    model.load_state_dict(trainer.model[0].state_dict())
    found = []
    for batch in step_batches(0, 0, 1):
        mask, tokens, labels = batch["loss_mask"], batch["tokens"], batch["labels"]
        no_auxiliary = Microbatch(labels=labels, factors=GradientFactors(loss_scale=0.0))
        losses = _gradients(model, no_auxiliary, tokens, mask)
        auxiliary = _gradients(model, Microbatch(labels=labels), tokens, torch.zeros_like(mask))
        found.append((mask.sum().item(), losses, auxiliary))
    return found


def _largest_error(plain: list[tuple[float, list[Tensor], list[Tensor]]]) -> float:
    """Of the gradients that AdamW gets in a step, against the plain ones times the whole product."""
    trainer = _trainer()
    record, _ = train_step(trainer, iter(step_batches(0, 0, 1)), Progress())
    clip = 0.5 / (record.grad_norm + 1e-6)
    assert clip < 1
    factors = GradientFactors(loss_scale=SCALE, num_microbatches=MICROBATCHES)
    # the first step's exp_avg is (1 - beta1) times the gradient
    beta1 = trainer.arguments.optimizer.adam_beta1
    found = {piece.name: piece.tensors["exp_avg"] / (1 - beta1) for piece in trainer.optimizer.state_pieces()}
    errors = []
    for number, (name, parameter) in enumerate(trainer.model.named_parameters()):
        expected = torch.zeros_like(parameter)
        for tokens, losses, auxiliary in plain:
            expected += losses[number] * factors.total(tokens, clip) + auxiliary[number] * factors.total(1, clip)
        errors.append(relative_difference(found[name].view_as(expected), expected))
    return max(errors)


def test_a_step_multiplies_by_the_whole_product() -> None:
    assert _largest_error(_plain_gradients()) < 1e-10


@pytest.mark.parametrize("part", ["loss", "auxiliary", "replicas", "update"])
def test_a_wrong_part_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, right = _plain_gradients(), getattr(GradientFactors, part)
    if isinstance(right, property):
        wrong: object = property(lambda self: right.__get__(self) * 2)
    else:
        wrong = lambda self, value: right(self, value) * 2  # noqa: E731
    monkeypatch.setattr(GradientFactors, part, wrong)
    assert _largest_error(plain) > 1e-3


def test_an_ordinary_microbatch_needs_nothing() -> None:
    ordinary = Microbatch()
    assert all(getattr(ordinary, field.name) in (0, None, GradientFactors()) for field in fields(ordinary))
    model = _trainer().model[0]
    tokens = step_batches(0, 0, 1)[0]["tokens"]
    assert torch.equal(model(tokens).tensor, model(tokens, ordinary).tensor)
