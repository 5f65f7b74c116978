"""The dynamic loss scale goes down after overflows and up after good steps."""

from megatron.core.optimizer.loss_scaler import LossScaler, new_loss_scaler
from megatron.core.optimizer.optimizer_config import OptimizerConfig


def _run(scaler: LossScaler, steps: str) -> list[float]:
    """The scale after each step: x overflows, . does not."""
    scales = []
    for step in steps:
        scaler.update(step == "x")
        scales.append(scaler.scale)
    return scales


def test_overflows_halve_and_a_window_of_good_steps_doubles() -> None:
    config = OptimizerConfig(initial_loss_scale=16, min_loss_scale=2, loss_scale_window=3, hysteresis=2)
    scaler = new_loss_scaler(config, float16=True)
    assert _run(scaler, "x") == [16]  # the first is tolerated
    assert _run(scaler, "x.x") == [8, 8, 4]  # once the tolerance is used up, it comes back only with a rise
    assert _run(scaler, "..x") == [4, 4, 2] and not scaler.can_lower
    assert _run(scaler, "x") == [2]
    assert _run(scaler, "...") == [2, 2, 4] and scaler.can_lower
    assert _run(scaler, "x") == [4]  # tolerated again
    assert _run(scaler, "x") == [2]


def test_the_state_survives_a_restart() -> None:
    config = OptimizerConfig(initial_loss_scale=16, loss_scale_window=3)
    scaler, resumed = new_loss_scaler(config, float16=True), new_loss_scaler(config, float16=True)
    _run(scaler, "xx..")
    resumed.load(scaler.state())
    assert resumed == scaler
    assert _run(resumed, ".xx") == _run(scaler, ".xx") == [16, 16, 8]


def test_other_types_have_no_scale_and_a_given_one_stays() -> None:
    assert new_loss_scaler(OptimizerConfig(), float16=False).scale == 1
    constant = new_loss_scaler(OptimizerConfig(loss_scale=128.0), float16=True)
    assert _run(constant, "xxx") == [128] * 3 and not constant.can_lower
    constant.load({"loss_scale": 4.0, "good_steps": 0, "tolerated_overflows": 1})
    assert constant.scale == 128
