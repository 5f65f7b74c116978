"""Warm-up and decay of the learning rate."""

import math

import pytest

from megatron.core.config import OptimizerConfig
from megatron.core.optimizer.param_scheduler import LearningRateSchedule


@pytest.mark.parametrize(
    ("style", "middle", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)), 0.1)],
)
def test_shapes(style: str, middle: float, end: float) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style=style, lr_warmup_init=0.2)  # type: ignore[arg-type]
    schedule = LearningRateSchedule(config, warmup_samples=100, decay_samples=300)
    assert schedule.learning_rate(0) == pytest.approx(0.2)
    assert schedule.learning_rate(50) == pytest.approx(0.6)
    assert schedule.learning_rate(100) == pytest.approx(1.0)
    assert schedule.learning_rate(200) == pytest.approx(middle)
    assert schedule.learning_rate(300) == schedule.learning_rate(10**9) == pytest.approx(end)


def test_a_warmup_longer_than_the_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="lower --lr-warmup-iters"):
        LearningRateSchedule(OptimizerConfig(), warmup_samples=300, decay_samples=300)
