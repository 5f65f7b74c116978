"""Warm-up and decay of the learning rate, and the growth of weight decay, against the formulas."""

import math
from typing import Any

import pytest

from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_scheduler import LearningRateSchedule, resolve_schedule


def build(warmup: int = 100, decay: int = 300, wsd: int = 80, **settings: Any) -> LearningRateSchedule:
    """Warm-up to 1.0 over 100 samples, decay to 0.1 at 300."""
    config = OptimizerConfig(**{"lr": 1.0, "min_lr": 0.1, "lr_warmup_init": 0.2} | settings)
    return LearningRateSchedule.from_config(
        config, warmup_samples=warmup, decay_samples=decay, wsd_decay_samples=wsd, weight_decay_samples=400
    )


@pytest.mark.parametrize(
    ("style", "at_150", "at_260", "end"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.2, 0.1),
        ("cosine", 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.1 + 0.45 * (1 + math.cos(math.pi * 0.8)), 0.1),
        ("inverse-square-root", math.sqrt(100 / 150), math.sqrt(100 / 260), 0.1),
        ("WSD", 1.0, 0.1 + 0.9 * (2 * 0.5**0.5 - 1), 0.1),
    ],
)
def test_shapes(style: str, at_150: float, at_260: float, end: float) -> None:
    schedule = build(lr_decay_style=style)
    rates = [schedule.learning_rate(samples) for samples in (0, 50, 100, 150, 260, 300, 10**9)]
    assert rates == pytest.approx([0.2, 0.6, 1.0, at_150, at_260, end, end])


@pytest.mark.parametrize(
    ("style", "after_half", "after_three_quarters"),
    [
        ("linear", 0.5, 0.25),
        ("cosine", 0.5, 0.5 * (1 + math.cos(0.75 * math.pi))),
        ("exponential", 2 * 0.5**0.5 - 1, 2 * 0.5**0.75 - 1),
        ("minus_sqrt", 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)),
    ],
)
def test_last_phase_of_warmup_stable_decay(style: str, after_half: float, after_three_quarters: float) -> None:
    schedule = build(lr_decay_style="WSD", lr_wsd_decay_style=style)
    shares = [(schedule.learning_rate(samples) - 0.1) / 0.9 for samples in (220, 260, 280, 300)]
    assert shares == pytest.approx([1, after_half, after_three_quarters, 0])


def test_the_inverse_square_root_does_not_fall_below_the_lowest_rate() -> None:
    assert build(warmup=1, lr_decay_style="inverse-square-root").learning_rate(299) == 0.1
    assert build(warmup=0, lr_decay_style="inverse-square-root").learning_rate(0) == 1.0


def test_the_vocabulary_has_its_own_rate() -> None:
    schedule = build(decoupled_lr=3.0, decoupled_min_lr=1.0)
    assert schedule.rates(50)[:2] == pytest.approx((0.6, 1.6))
    assert schedule.rates(200)[:2] == pytest.approx((0.55, 2.0))
    assert schedule.rates(300)[:2] == pytest.approx((0.1, 1.0))
    same = build().rates(200)
    assert same.vocabulary_learning_rate == same.learning_rate


@pytest.mark.parametrize(
    ("style", "shares"), [("linear", [0, 0.25, 1, 1]), ("cosine", [0, 0.5 * (1 - math.cos(math.pi / 4)), 1, 1])]
)
def test_weight_decay_grows(style: str, shares: list[float]) -> None:
    schedule = build(weight_decay_incr_style=style, start_weight_decay=0.1, end_weight_decay=0.3)
    decays = [schedule.rates(samples).weight_decay for samples in (0, 100, 400, 500)]
    assert decays == pytest.approx([0.1 + 0.2 * share for share in shares])
    assert build(weight_decay=0.25).rates(7).weight_decay == 0.25


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="lower --lr-warmup-iters"):
        build(warmup=300)
    for last_phase in (0, 201):
        with pytest.raises(ValueError, match="--lr-wsd-decay-iters"):
            build(lr_decay_style="WSD", wsd=last_phase)


def test_a_resumed_run_keeps_its_schedule_or_says_so() -> None:
    saved = build().settings()
    ours = build(lr=2.0, decay=500)
    assert resolve_schedule(build(), saved, override=False, use_checkpoint=False) == build()
    with pytest.raises(ValueError, match=r"decay_samples was 300, is 500; lr was 1.0, is 2.0.*override"):
        resolve_schedule(ours, saved, override=False, use_checkpoint=False)
    assert resolve_schedule(ours, saved, override=True, use_checkpoint=False) == ours
    kept = resolve_schedule(ours, saved, override=False, use_checkpoint=True)
    assert [kept.rates(n) for n in range(0, 600, 7)] == [build().rates(n) for n in range(0, 600, 7)]


def test_a_longer_run_at_a_constant_rate_is_the_same_schedule() -> None:
    saved = build(lr_decay_style="constant").settings()
    resolve_schedule(build(lr_decay_style="constant", decay=900), saved, override=False, use_checkpoint=False)


def test_a_refused_schedule_names_only_what_was_set() -> None:
    saved = build().settings()
    with pytest.raises(ValueError) as error:
        resolve_schedule(build(lr=saved["lr"] * 2), saved, override=False, use_checkpoint=False)
    assert "lr was" in str(error.value) and "decoupled" not in str(error.value)
    with pytest.raises(ValueError, match="decoupled_lr was"):
        resolve_schedule(build(decoupled_lr=saved["lr"] * 2), saved, override=False, use_checkpoint=False)
    with pytest.raises(ValueError, match="checkpoint's: weight_decay was"):
        resolve_schedule(build(weight_decay=0.1), saved, override=False, use_checkpoint=False)
