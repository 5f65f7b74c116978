"""The Mixtral language model, or the stages of it that one pipeline rank holds (arXiv:2401.04088)."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import ProcessGroups
from megatron.core.recompute import NO_RECOMPUTE, RecomputeConfig
from megatron.core.stages import Stage, whole_model
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding, VocabParallelOutput
from megatron.core.tensor_parallel.parameter import NamedShard, Placement, named_shards
from megatron.core.transformer.moe.router import RouterStatistics
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer


class ModelOutput(NamedTuple):
    """What one stage makes of one microbatch."""

    tensor: Tensor
    """Hidden states [S, B, H] (or [S/tp, B, H]) for the next stage; on the last stage the loss of each token [B, S]
    if labels were given, else the logits [B, S, vocabulary]."""
    statistics: RouterStatistics
    """Router statistics of the stage's layers, stacked [layers, ...]."""


class MixtralModel(nn.Module):
    """One stage of the model, the whole of it if no `stage` is given."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        groups: ProcessGroups,
        sequence_parallel: bool,
        device: torch.device,
        stage: Stage | None = None,
        recompute: RecomputeConfig = NO_RECOMPUTE,
    ) -> None:
        super().__init__()
        self.stage = stage = stage or whole_model(config.num_layers)
        assert config.vocab_size is not None, "the vocabulary size is not known yet"
        self.cp = groups.cp
        self.sequence_parallel = sequence_parallel and groups.tp.size > 1
        placement = Placement(
            dtype=config.dtype, device=device, group=groups.tp, sequence_parallel=self.sequence_parallel
        )
        padded = config.padded_vocab_size(groups.tp.size)
        vocabulary = (config.vocab_size, padded, config.hidden_size, config.init_method_std, placement)
        self.embedding = None
        if stage.has_embedding:
            self.embedding = nn.ModuleDict({"word_embeddings": VocabParallelEmbedding(*vocabulary)})
        self.decoder = TransformerBlock(config, stage, groups, placement, recompute)
        self.output_layer = VocabParallelOutput(*vocabulary) if stage.has_output else None

    @property
    def first_layer(self) -> int:
        """Number of the stage's first layer in the whole model."""
        return self.stage.layers.start

    def forward(self, x: Tensor, microbatch: Microbatch | None = None) -> ModelOutput:
        """Runs the stage on an ordinary microbatch if none is given; S is this rank's part of the sequence.

        `x` is int64 tokens [B, S] on the first stage, the output of the stage before on all others.
        """
        microbatch = microbatch or Microbatch()
        if self.embedding is not None:
            x = self.embedding["word_embeddings"](x)
        hidden, statistics = self.decoder(x, microbatch)
        if self.output_layer is None:
            return ModelOutput(hidden, statistics)
        if microbatch.labels is None:
            return ModelOutput(self.output_layer(hidden).transpose(0, 1), statistics)
        return ModelOutput(self.output_layer(hidden, microbatch.labels.t()).t(), statistics)

    def set_expert_share(self, share_LE: Tensor) -> None:
        """Gives routers the part of all tokens that chose each expert: [layers of the whole model, experts]."""
        for number, layer in zip(self.stage.layers, self.decoder.layers, strict=True):
            cast(TransformerLayer, layer).mlp.router.expert_share = share_LE[number]


class ModelChunks(nn.ModuleList):
    """The stages of the model that this rank holds: one, or several with an interleaved pipeline."""

    def __iter__(self) -> Iterator[MixtralModel]:
        return cast(Iterator[MixtralModel], super().__iter__())

    @property
    def sequence_parallel(self) -> bool:
        """Whether hidden states between its layers are split along the sequence."""
        return next(iter(self)).sequence_parallel

    def named_shards(self) -> Iterator[NamedShard]:
        """This rank's part of every tensor, of all stages; global names are unique."""
        for chunk in self:
            yield from named_shards(chunk, chunk.first_layer)

    def checkpoint_keys(self) -> list[tuple[str, MixtralModel]]:
        """Each stage with Megatron's name for it in a checkpoint: `model`, or `model0`, `model1`, ..."""
        return [("model" if len(self) == 1 else f"model{number}", chunk) for number, chunk in enumerate(self)]
