"""Training with masters, moments and gradients in fewer bits: what changes, what does not, and its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_testing import assert_same_tensors, load, save, state_of, tiny_trainer, train
from model_testing import relative_difference, tiny_arguments
from torch import Tensor

from megatron.training.arguments import parse_arguments
from megatron.training.checkpoints.formats import SAVED_FORMATS
from megatron.training.progress import Progress
from megatron.training.setup import Trainer
from megatron.training.training import train_step

SMALL = "--train-iters 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 100".split()
AWARE = {"use_precision_aware_optimizer": True}
REMAINDERS = AWARE | {"main_params_dtype": "bf16-remainder"}
BF16 = REMAINDERS | {"main_grads_dtype": "bf16", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
SCALED = REMAINDERS | {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}
# experts of 4,704 and 1,568 numbers, which end within a block of 64
UNEVEN = {"ffn_hidden_size": 49}


def _trainer(**settings: Any) -> Trainer:
    return tiny_trainer(tiny_arguments("bfloat16", UNEVEN | settings))


def test_remainders_train_as_float32_masters_do() -> None:
    wide, split = _trainer(), _trainer(**REMAINDERS)
    losses = [train(trainer, Progress(), 6) for trainer in (wide, split)]
    assert losses[0] == losses[1]
    assert_same_tensors(state_of(split), state_of(wide))
    assert not any(piece.state["master"].plain for piece in split.optimizer.state_pieces())


@pytest.mark.parametrize("settings", [BF16, SCALED], ids=["bf16", "fp8 and fp16"])
@pytest.mark.parametrize("ckpt_format", list(SAVED_FORMATS))
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, settings: dict[str, Any], ckpt_format: str) -> None:
    first = _trainer(save=str(tmp_path), ckpt_format=ckpt_format, **settings)
    progress = Progress()
    train(first, progress, 3)
    save(first, progress)
    second = _trainer(load=str(tmp_path), **settings)
    for piece in second.optimizer.state_pieces():  # what it had before leaves no trace
        for stored in piece.state.values():
            stored.write(torch.full((stored.numel(),), 1e6))
    resumed, remark = load(second)
    assert "converted" not in remark and "changed" not in remark
    assert_same_tensors(state_of(second), state_of(first))
    assert train(second, resumed, 2) == train(first, progress, 2)
    assert_same_tensors(state_of(second), state_of(first))


@pytest.mark.parametrize("ckpt_format", list(SAVED_FORMATS))
def test_state_is_converted_when_it_is_loaded(tmp_path: Path, ckpt_format: str) -> None:
    progress, trainers = Progress(), {}
    for name, settings in (("full", {}), ("scaled", SCALED)):
        trainers[name] = _trainer(save=str(tmp_path / name), ckpt_format=ckpt_format, **settings)
        progress = Progress()
        train(trainers[name], progress, 3)
        save(trainers[name], progress)
    narrowed = _trainer(load=str(tmp_path / "full"), **SCALED)
    _, remark = load(narrowed)
    phrases = ("masters from fp32 to bf16-remainder", "first moments from fp32 to fp8", "second moments from fp32")
    assert f"converted: {', '.join(phrases)} to fp16" in remark.splitlines() and "changed" not in remark
    for ours, theirs in zip(narrowed.optimizer.state_pieces(), trainers["full"].optimizer.state_pieces(), strict=True):
        for name, bound in (("master", 0.0), ("exp_avg", 0.05), ("exp_avg_sq", 5e-4)):
            assert relative_difference(ours.tensors[name].float(), theirs.tensors[name]) <= bound
    # what is kept in fewer bits is in float32 exactly what it was
    widened = _trainer(load=str(tmp_path / "scaled"))
    load(widened)
    for ours, theirs in zip(widened.optimizer.state_pieces(), trainers["scaled"].optimizer.state_pieces(), strict=True):
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name].float()) for name in ours.state)


def test_moments_in_bfloat16_make_a_smaller_checkpoint(tmp_path: Path) -> None:
    sizes = {}
    for name, settings in (("full", {}), ("bf16", BF16)):
        trainer = _trainer(save=str(tmp_path / name), **settings)
        save(trainer, Progress())
        sizes[name] = sum(path.stat().st_size for path in tmp_path.glob(f"{name}/iter_*/*.safetensors"))
    # weights 2, masters 4 and moments of 8 or 4 bytes, and a few kilobytes of names and random states
    assert sizes["bf16"] / sizes["full"] == pytest.approx(10 / 14, rel=0.03)


def test_weights_alone_make_fresh_masters(tmp_path: Path) -> None:
    first = _trainer(save=str(tmp_path), **SCALED)
    progress = Progress()
    train(first, progress, 3)
    save(first, progress)
    second = _trainer(load=str(tmp_path), finetune=True, **SCALED)
    load(second)
    for piece in second.optimizer.state_pieces():
        weights = piece.parameter.detach().reshape(-1)[piece.start : piece.end]
        assert torch.equal(piece.tensors["master"], weights.float())
        assert not piece.tensors["exp_avg"].any() and not piece.tensors["exp_avg_sq"].any()


def _text(step: int) -> list[dict[str, Tensor]]:
    """The one microbatch of a step, of a language in which each word has three that may follow, one of them mostly."""
    table = torch.randint(0, 203, (203, 3), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(step)
    words = [torch.randint(0, 203, (8,), generator=generator)]
    for _ in range(16):
        choice = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 8, replacement=True, generator=generator)
        words.append(table[words[-1], choice])
    text = torch.stack(words, dim=1)
    mask = torch.ones(8, 16, dtype=torch.float64)
    return [{"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(), "loss_mask": mask}]


def _final_loss(settings: dict[str, Any], steps: int = 300) -> float:
    """The mean of the last 20 losses, whose batches are the same in every run, at the end of a decay to zero.

    All experts get all tokens: a token that goes elsewhere changes more than what is compared.
    """
    schedule = {"train_iters": steps, "lr": 2e-3, "min_lr": 0.0, "lr_warmup_iters": 20, "adam_beta2": 0.95}
    shape = {"micro_batch_size": 8, "moe_router_topk": 4}
    trainer, progress, losses = _trainer(**schedule | shape | settings), Progress(), []
    for step in range(steps):
        record, _ = train_step(trainer, iter(_text(step)), progress)
        losses.append(record.averages.lm_loss)
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20]), "nothing was learnt"
    return sum(losses[-20:]) / 20


@pytest.mark.slow
def test_three_hundred_steps_end_where_full_precision_does() -> None:
    full = _final_loss({})
    assert _final_loss(REMAINDERS) == full
    moments = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    assert _final_loss(REMAINDERS | moments) == pytest.approx(full, rel=2e-3)


def _remarks(flags: str) -> list[str]:
    return parse_arguments([*SMALL, "--use-precision-aware-optimizer", *flags.split()])[1]


def test_an_average_that_cannot_fall_is_named() -> None:
    assert _remarks("--exp-avg-dtype fp8 --exp-avg-sq-dtype fp16") == []
    assert _remarks("--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --adam-beta2 0.95") == []
    (warning,) = _remarks("--exp-avg-sq-dtype bf16")
    assert "--exp-avg-sq-dtype bf16 rounds away a decay of 0.999" in warning and "at most 0.99609" in warning
    (warning,) = _remarks("--exp-avg-sq-dtype fp8 --adam-beta2 0.95")
    assert "at most 0.9375" in warning
