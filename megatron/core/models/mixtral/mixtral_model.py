"""The Mixtral language model, or the stages of it that one pipeline rank holds (arXiv:2401.04088)."""

import torch
from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.microbatch import Microbatch
from megatron.core.models.common import ModelOutput, ModelStage, parameter_specs
from megatron.core.models.mixtral.weights import mixtral_table
from megatron.core.parallel_state import ProcessGroups
from megatron.core.recompute import NO_RECOMPUTE, RecomputeConfig
from megatron.core.stages import Stage, whole_model
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding, VocabParallelOutput
from megatron.core.tensor_parallel.parameter import Placement, specs_of
from megatron.core.transformer.transformer_block import TransformerBlock


class MixtralModel(ModelStage):
    """One stage of the model, the whole of it if no `stage` is given; see `Placement` for `allocate`."""

    kind = "Mixtral"

    def __init__(
        self,
        config: ModelConfig,
        *,
        groups: ProcessGroups,
        sequence_parallel: bool,
        device: torch.device,
        stage: Stage | None = None,
        recompute: RecomputeConfig = NO_RECOMPUTE,
        allocate: bool = True,
    ) -> None:
        stage = stage or whole_model(config.num_layers)
        table = mixtral_table(config, config.padded_vocab_size(groups.tp.size))
        super().__init__(stage, table, groups, sequence_parallel)
        placement = Placement(
            dtype=config.dtype,
            device=device,
            group=groups.tp,
            sequence_parallel=self.sequence_parallel,
            allocate=allocate,
        )
        rows = table.first + table.layer + table.last
        specs = parameter_specs(rows, table.num_experts, groups, self.sequence_parallel)
        self.embedding = None
        if stage.has_embedding:
            word_embeddings = VocabParallelEmbedding(specs["embedding.word_embeddings.weight"], placement)
            self.embedding = nn.ModuleDict({"word_embeddings": word_embeddings})
        self.decoder = TransformerBlock(config, stage, specs_of("decoder", specs), groups, placement, recompute)
        self.output_layer = VocabParallelOutput(specs["output_layer.weight"], placement) if stage.has_output else None

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
