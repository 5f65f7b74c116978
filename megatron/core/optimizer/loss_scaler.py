"""Scaling of the loss, so that small gradients do not vanish in float16 (arXiv:1710.03740, section 3.2)."""

from dataclasses import dataclass

from megatron.core.optimizer.optimizer_config import OptimizerConfig


@dataclass
class LossScaler:
    """The factor of the next step's loss; a dynamic one is lowered where gradients overflow and raised again later.

    After `hysteresis` overflows (the count is reset by every rise) each one halves the scale, down to `min_loss_scale`;
    `loss_scale_window` steps without any double it, as in Megatron-LM.
    """

    config: OptimizerConfig
    scale: float
    is_dynamic: bool
    good_steps: int = 0
    """Steps since the last overflow or rise."""
    tolerated: int = 0
    """Overflows until the scale is lowered."""

    @property
    def can_lower(self) -> bool:
        """Whether an overflow may be the scale's fault, and not the model's."""
        return self.is_dynamic and self.scale > self.config.min_loss_scale

    def update(self, overflow: bool) -> None:
        """Takes note of a step."""
        if not self.is_dynamic:
            return
        if overflow:
            self.good_steps = 0
            self.tolerated -= 1
            if self.tolerated <= 0:
                self.scale = max(self.scale / 2, self.config.min_loss_scale)
            return
        self.good_steps += 1
        if self.good_steps == self.config.loss_scale_window:
            self.good_steps, self.tolerated = 0, self.config.hysteresis
            self.scale *= 2

    def state(self) -> dict[str, float]:
        """Plain numbers, for a checkpoint."""
        return {"loss_scale": self.scale, "good_steps": self.good_steps, "tolerated_overflows": self.tolerated}

    def load(self, state: dict[str, float]) -> None:
        """Takes back what `state` gave; a constant scale stays as it is configured."""
        if self.is_dynamic:
            self.scale = float(state["loss_scale"])
            self.good_steps, self.tolerated = int(state["good_steps"]), int(state["tolerated_overflows"])


def new_loss_scaler(config: OptimizerConfig, float16: bool) -> LossScaler:
    """A constant scale if one is given, a dynamic one for float16, else 1."""
    if config.loss_scale is not None or not float16:
        return LossScaler(config, config.loss_scale or 1.0, is_dynamic=False)
    return LossScaler(config, config.initial_loss_scale, is_dynamic=True, tolerated=config.hysteresis)
