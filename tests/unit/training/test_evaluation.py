"""Evaluations take the same samples every time and leave the model as it was."""

import signal
from dataclasses import replace

import pytest
import torch
from model_testing import tiny_arguments

import pretrain_gpt
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import ProcessGroups
from megatron.training import evaluation
from megatron.training.setup import Trainer, build_trainer
from megatron.training.signals import StopSignal
from megatron.training.training import evaluate


def evaluating_trainer() -> Trainer:
    """Two batches an evaluation."""
    arguments = tiny_arguments(settings={"moe_input_jitter_eps": 0.3})  # which is for training alone
    arguments = replace(
        arguments,
        training=replace(arguments.training, eval_iters=2),
        data=replace(arguments.data, num_workers=0),
    )
    return build_trainer(
        arguments, ProcessGroups(), torch.device("cpu"), pretrain_gpt.model_provider, pretrain_gpt.forward_step
    )


def test_the_mean_over_the_first_samples() -> None:
    trainer = evaluating_trainer()
    dataset = MockGPTDataset(203, 16, 40, 1)
    first = evaluate(trainer, dataset)
    assert evaluate(trainer, dataset) == first
    samples = [dataset[index] for index in range(16)]
    tokens = torch.stack([torch.as_tensor(sample["tokens"]) for sample in samples])
    labels = torch.stack([torch.as_tensor(sample["labels"]) for sample in samples])
    assert trainer.model.training
    with torch.no_grad():
        expected = trainer.model.eval()[0](tokens, Microbatch(labels=labels)).tensor.mean()
    assert first == pytest.approx(expected.item(), rel=1e-6)  # masks are float32
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_progress_is_shown_and_a_signal_cuts_it_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "_PROGRESS_INTERVAL", -1.0)
    trainer, dataset = evaluating_trainer(), MockGPTDataset(203, 16, 40, 1)
    assert evaluate(trainer, dataset, "test") == evaluate(trainer, dataset)
    assert capsys.readouterr().out.startswith("evaluating on the test split: 1 of 2 batches, about")
    stop_signal = StopSignal()
    stop_signal._note(signal.SIGTERM)
    assert evaluate(trainer, dataset, "test", stop_signal) is None
    assert capsys.readouterr().out == "" and trainer.model.training
