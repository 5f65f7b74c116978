"""Learning rate as a pure function of the samples that updates were made from."""

import math

from megatron.core.config import OptimizerConfig


class LearningRateSchedule:
    """Linear warm-up, then constant, linear or cosine decay to the lowest rate, as in Megatron-LM."""

    def __init__(self, config: OptimizerConfig, *, warmup_samples: int, decay_samples: int) -> None:
        if decay_samples <= 0:
            raise ValueError(f"the learning rate needs a positive decay length, got {decay_samples} samples")
        if warmup_samples > decay_samples or (warmup_samples == decay_samples and config.lr_decay_style != "constant"):
            raise ValueError(
                f"the warm-up ({warmup_samples} samples) must be shorter than the decay ({decay_samples} samples): "
                "lower --lr-warmup-iters or raise --lr-decay-iters"
            )
        self.config, self.warmup_samples, self.decay_samples = config, warmup_samples, decay_samples

    def learning_rate(self, samples: int) -> float:
        """Rate of the update that follows after `samples` samples."""
        config = self.config
        if samples < self.warmup_samples:
            return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * samples / self.warmup_samples
        if config.lr_decay_style == "constant":
            return config.lr
        if samples >= self.decay_samples:
            return config.min_lr
        done = (samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        share = 1 - done if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return config.min_lr + (config.lr - config.min_lr) * share
