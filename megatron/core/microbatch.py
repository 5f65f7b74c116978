"""A microbatch as the model sees it, and all that its gradients are multiplied by on their way to the weights."""

from dataclasses import dataclass, field

from torch import Tensor

from megatron.core.fusions.attention import Documents


@dataclass(frozen=True, kw_only=True)
class GradientFactors:
    """What gradients are multiplied by between a loss and the update of the weights.

    With l_t the loss of token t, n_m the tokens of microbatch m that count (`loss_mask`, on all context-parallel
    ranks), a_m the sum of its auxiliary losses, and all sums over the microbatches and tokens of all ranks, AdamW gets

        sum_mt dl_t/dw  *  cp / n_m * loss_scale / num_microbatches  *  1 / (dp * cp)  *  clip / loss_scale
      + sum_m  da_m/dw  *  cp       * loss_scale / num_microbatches  *  1 / (dp * cp)  *  clip / loss_scale
                           `loss`, `auxiliary`                          `replicas`        `update`

    which is clip / (dp * num_microbatches) times the gradient of each microbatch's mean loss. The first part is
    applied by the last stage and by the routers, the second by the gradient buffers, the third by the optimizer.
    """

    loss_scale: float = 1.0
    """What keeps small gradients from vanishing in float16."""
    num_microbatches: int = 1
    """Of the step, on each data-parallel rank."""
    dp: int = 1
    """Data-parallel ranks, each with its own microbatches."""
    cp: int = 1
    """Context-parallel ranks, each with a part of every sequence."""

    def loss(self, tokens: Tensor) -> Tensor:
        """For the sum of the losses of this rank's part of a microbatch of which `tokens` count, on all cp ranks."""
        return self.cp / tokens * (self.loss_scale / self.num_microbatches)

    @property
    def auxiliary(self) -> float:
        """For this rank's part of the auxiliary losses of a microbatch, which are means already."""
        return self.cp * (self.loss_scale / self.num_microbatches)

    @property
    def replicas(self) -> int:
        """Divisor of sums over all ranks that worked on the step; also for experts, though fewer ranks hold them."""
        return self.dp * self.cp

    def update(self, clip: float) -> float:
        """For reduced gradients, of which clipping leaves the part `clip`."""
        return clip / self.loss_scale

    def total(self, tokens: float, clip: float) -> float:
        """The whole product, for the loss of a token; with `tokens` 1 for an auxiliary loss."""
        return clip / (self.dp * self.num_microbatches * tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class Microbatch:
    """What a stage gets with a microbatch besides its tokens; an ordinary one needs none of it."""

    seed: int = 0
    """Seed of the run."""
    first_sample: int = 0
    """Number, in the run, of the first of its samples; the others follow."""
    labels: Tensor | None = None
    """int64 [B, S/cp], the tokens to predict; read by the last stage, which returns logits without them."""
    position_ids: Tensor | None = None
    """int64 [B, S/cp], where they do not just count the tokens of a sample; read by every stage."""
    documents: Documents | None = None
    """Those of its samples if they must not see each other; read by every stage."""
    factors: GradientFactors = field(default_factory=GradientFactors)
    """What its gradients are multiplied by."""
    places: Tensor | None = None
    """int64 [S/cp], where this rank's tokens stand in their samples; filled in by the transformer block."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin, each [S/cp, head_dim/2] or, by sample, [B, S/cp, head_dim/2]; filled in by the block."""
