"""Learning rates and weight decay as pure functions of the samples that updates were made from."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from megatron.core.optimizer.optimizer_config import OptimizerConfig


class StepRates(NamedTuple):
    """The hyperparameters of one update."""

    learning_rate: float
    vocabulary_learning_rate: float
    """That of the embedding and the output layer."""
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """Linear warm-up, then a decay to the lowest rate; the formulas are Megatron-LM's (docs/optimizer.md)."""

    lr: float
    min_lr: float
    decoupled_lr: float
    decoupled_min_lr: float
    lr_warmup_init: float
    warmup_samples: int
    lr_decay_style: str
    decay_samples: int
    wsd_decay_style: str
    wsd_decay_samples: int
    """Length of the last phase of a warmup-stable-decay schedule."""
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_incr_style: str
    weight_decay_samples: int
    """Samples after which the weight decay stays at its end."""

    def __post_init__(self) -> None:
        if self.decay_samples <= 0:
            raise ValueError(f"the learning rate needs a positive decay length, got {self.decay_samples} samples")
        constant = self.lr_decay_style == "constant"
        if self.warmup_samples > self.decay_samples or (self.warmup_samples == self.decay_samples and not constant):
            raise ValueError(
                f"the warm-up ({self.warmup_samples} samples) must be shorter than the decay ({self.decay_samples} "
                "samples): lower --lr-warmup-iters or raise --lr-decay-iters"
            )
        if self.lr_decay_style == "WSD" and not 0 < self.wsd_decay_samples <= self.decay_samples - self.warmup_samples:
            raise ValueError(
                f"the last phase of a WSD schedule ({self.wsd_decay_samples} samples) must lie between warm-up and "
                f"end ({self.decay_samples - self.warmup_samples} samples): set --lr-wsd-decay-iters or "
                "--lr-wsd-decay-samples"
            )

    @classmethod
    def from_config(
        cls,
        config: OptimizerConfig,
        *,
        warmup_samples: int,
        decay_samples: int,
        wsd_decay_samples: int = 0,
        weight_decay_samples: int = 1,
    ) -> "LearningRateSchedule":
        """The schedule that the flags describe, lengths in samples. Raises ValueError if lengths do not fit."""
        ends = (config.start_weight_decay, config.end_weight_decay)
        start, end = (config.weight_decay if value is None else value for value in ends)
        return cls(
            lr=config.lr,
            min_lr=config.min_lr,
            decoupled_lr=config.lr if config.decoupled_lr is None else config.decoupled_lr,
            decoupled_min_lr=config.min_lr if config.decoupled_min_lr is None else config.decoupled_min_lr,
            lr_warmup_init=config.lr_warmup_init,
            warmup_samples=warmup_samples,
            lr_decay_style=config.lr_decay_style,
            decay_samples=decay_samples,
            wsd_decay_style=config.lr_wsd_decay_style,
            wsd_decay_samples=wsd_decay_samples,
            start_weight_decay=start,
            end_weight_decay=end,
            weight_decay_incr_style=config.weight_decay_incr_style,
            weight_decay_samples=weight_decay_samples,
        )

    def rates(self, samples: int) -> StepRates:
        """Those of the update that follows after `samples` samples."""
        return StepRates(
            self.learning_rate(samples),
            self._rate(samples, self.decoupled_lr, self.decoupled_min_lr),
            self.weight_decay(samples),
        )

    def learning_rate(self, samples: int) -> float:
        """Rate of the update that follows after `samples` samples."""
        return self._rate(samples, self.lr, self.min_lr)

    def _rate(self, samples: int, highest: float, lowest: float) -> float:
        if samples < self.warmup_samples:
            return self.lr_warmup_init + (highest - self.lr_warmup_init) * samples / self.warmup_samples
        if self.lr_decay_style == "constant":
            return highest
        if samples >= self.decay_samples:
            return lowest
        if self.lr_decay_style == "inverse-square-root":
            return max(lowest, highest * math.sqrt(max(self.warmup_samples, 1) / max(samples, 1)))
        return lowest + (highest - lowest) * self._share(samples)

    def _share(self, samples: int) -> float:
        """How much of the way down from the highest to the lowest rate is left, 1 to 0."""
        style, start = self.lr_decay_style, self.warmup_samples
        if style == "WSD":
            style, start = self.wsd_decay_style, self.decay_samples - self.wsd_decay_samples
        done = max(0, samples - start) / (self.decay_samples - start)
        shares = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "exponential": 2 * 0.5**done - 1,
            "minus_sqrt": 1 - math.sqrt(done),
        }
        return shares[style]

    def weight_decay(self, samples: int) -> float:
        """Weight decay of the update that follows after `samples` samples."""
        done = min(1.0, samples / self.weight_decay_samples)
        share = 0.5 * (1 - math.cos(math.pi * done)) if self.weight_decay_incr_style == "cosine" else done
        return self.start_weight_decay + (self.end_weight_decay - self.start_weight_decay) * share

    def settings(self) -> dict[str, Any]:
        """All that the schedule depends on, as plain values, for a checkpoint; what has no effect is left out."""
        values = asdict(self)
        if self.lr_decay_style == "constant":
            del values["min_lr"], values["decoupled_min_lr"], values["decay_samples"]
        if self.lr_decay_style != "WSD":
            del values["wsd_decay_style"], values["wsd_decay_samples"]
        if self.start_weight_decay == self.end_weight_decay:
            del values["weight_decay_incr_style"], values["weight_decay_samples"]
        return values


def resolve_schedule(
    ours: LearningRateSchedule, saved: dict[str, Any], *, override: bool, use_checkpoint: bool
) -> LearningRateSchedule:
    """The schedule of a resumed run: the command line's (`ours`), which must be the one that was `saved`.

    `override` takes the command line's and `use_checkpoint` the saved one where they differ; with neither, that raises
    ValueError.
    """
    if use_checkpoint:
        return LearningRateSchedule(**{**asdict(ours), **saved})
    now = ours.settings()
    constant = _follows("end_weight_decay", saved) and _follows("end_weight_decay", now)
    prefix = "start_" if constant else ""
    changed = [
        f"{name.removeprefix(prefix)} was {saved.get(name, 'not set')}, is {now.get(name, 'not set')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name) and not (_follows(name, saved) and _follows(name, now))
    ]
    if changed and not override:
        raise ValueError(
            f"the schedule differs from the checkpoint's: {'; '.join(changed)}. Add --override-opt_param-scheduler to "
            "go on with that of the command line, or --use-checkpoint-opt_param-scheduler to go on with the saved one"
        )
    return ours


def _follows(name: str, settings: dict[str, Any]) -> bool:
    """Whether a setting was not given and is that of another one, which is named itself if it has changed."""
    leader = {"decoupled_lr": "lr", "decoupled_min_lr": "min_lr", "end_weight_decay": "start_weight_decay"}.get(name)
    return leader is not None and settings.get(name) == settings.get(leader)
