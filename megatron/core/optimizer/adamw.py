"""AdamW (arXiv:1711.05101) as a rule of the optimizer."""

from megatron.core.fusions.adamw import AdamWStep, adamw_
from megatron.core.fusions.stored import StateType
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.update_rule import Segment, Update


class AdamW:
    """Keeps two moments of each parameter, 8 bytes in float32; the formula is in docs/optimizer.md."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    @property
    def state_types(self) -> dict[str, StateType]:
        """See `UpdateRule`; one divides by the root of the second moment."""
        return {
            "exp_avg": StateType(self.config.exp_avg_dtype),
            "exp_avg_sq": StateType(self.config.exp_avg_sq_dtype, positive=True),
        }

    def update(self, segment: Segment, numbers: Update) -> None:
        """See `UpdateRule`."""
        adamw_(
            segment.master,
            segment.state["exp_avg"],
            segment.state["exp_avg_sq"],
            segment.grad,
            AdamWStep(
                number=numbers.number,
                learning_rate=numbers.learning_rate,
                beta1=self.config.adam_beta1,
                beta2=self.config.adam_beta2,
                epsilon=self.config.adam_eps,
                weight_decay=numbers.weight_decay,
                factor=numbers.factor,
            ),
            segment.weights,
        )
