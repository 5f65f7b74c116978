"""The one table between Hugging Face's names for Mixtral's weights and Megatron's.

Every weight of the Megatron model is one `WeightRule`: where it comes from in the Hugging Face checkpoint, how its
sources are put together, and how it is cut over tensor-parallel ranks. Names are global: layers are numbered through
the whole model and experts have one name each. Cutting commutes with combining: a rank's part is made of the same
part of every source, so no tool ever needs a whole model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron.core.config import ModelConfig
from megatron.core.tensor_parallel.partition import slice_for_rank


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor of a Hugging Face Mixtral checkpoint in its spelling on disk, and where transformers 5 keeps it."""

    name: str
    """Name on disk (`block_sparse_moe`, one tensor a projection of an expert)."""
    shape: tuple[int, ...]
    """Shape under that name."""
    fused_name: str
    """Name in transformers 5's spelling; the same where that did not change."""
    fused_shape: tuple[int, ...]
    """Shape under that name: experts are stacked, gate above up."""
    expert: int | None = None
    """Index into the stack, None if the fused tensor is not a stack."""
    first_row: int = 0
    """Row of the stacked matrix where this tensor begins."""


@dataclass(frozen=True)
class WeightRule:
    """One weight of the Megatron model, as cut by `megatron.core.tensor_parallel.partition`."""

    name: str
    """Global Megatron name."""
    sources: tuple[HuggingFaceTensor, ...]
    """Hugging Face tensors it is made of, in order."""
    layer: int | None = None
    """Transformer layer it belongs to, counted through the whole model."""
    partition_dim: int | None = None
    """Dimension that is cut over tensor-parallel ranks; None if every rank holds it whole."""
    partition_stride: int = 1
    """Blocks along that dimension that are cut by themselves (2 for gate and up)."""
    groups: int = 1
    """Row groups: each source has this many, and group g of all sources come before group g + 1 of any."""
    padded_rows: int | None = None
    """Rows after padding of a weight with a row for each vocabulary entry; None for other weights."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, vocabulary padding included."""
        rows = self.padded_rows or sum(source.shape[0] for source in self.sources)
        return (rows, *self.sources[0].shape[1:])

    def source_ranges(self, rank: int = 0, size: int = 1) -> list[tuple[slice, ...]]:
        """What to read of each source for the part of tensor-parallel rank `rank` of `size`, one slice a dimension."""
        if len(self.sources) > 1 and self.partition_stride == 1 and self.groups % size:
            raise ValueError(f"{self.name}: {self.groups} groups are not divisible by the tensor-parallel size {size}")
        ranges = []
        for source in self.sources:
            index = [slice(0, length) for length in source.shape]
            if self.partition_dim is not None:
                rows = self.padded_rows if self.padded_rows is not None else source.shape[self.partition_dim]
                if rows % size:
                    raise ValueError(f"{self.name}: {rows} is not divisible by the tensor-parallel size {size}")
                part, length = rows // size, source.shape[self.partition_dim]
                index[self.partition_dim] = slice(min(rank * part, length), min((rank + 1) * part, length))
            ranges.append(tuple(index))
        return ranges

    def from_huggingface(self, parts: Sequence[torch.Tensor], rank: int = 0, size: int = 1) -> torch.Tensor:
        """The part of rank `rank` of `size`, from the parts of the sources that `source_ranges` names.

        Vocabulary rows that the sources do not have are zero.
        """
        assert len(parts) == len(self.sources), self.name
        if self.padded_rows is not None:
            return pad_rows(parts[0], self.padded_rows // size)
        if len(parts) == 1:
            return parts[0]
        groups = self.groups // size if self.partition_stride == 1 else self.groups
        tail = parts[0].shape[1:]
        return torch.cat([part.reshape(groups, -1, *tail) for part in parts], dim=1).reshape(-1, *tail)

    def to_huggingface(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The sources, from the whole tensor with or without vocabulary padding: the inverse of `from_huggingface`."""
        if self.padded_rows is not None:
            return [tensor[: self.sources[0].shape[0]]]
        if len(self.sources) == 1:
            return [tensor]
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        rows = [source.shape[0] // self.groups for source in self.sources]
        parts = grouped.split(rows, dim=1)
        return [part.reshape(source.shape) for part, source in zip(parts, self.sources, strict=True)]

    def slice_padded(self, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """Part of rank `rank` of `size` of a whole tensor, its vocabulary rows first made `padded_rows`."""
        if self.padded_rows is not None:
            tensor = pad_rows(tensor[: self.sources[0].shape[0]], self.padded_rows)
        return slice_for_rank(tensor, self.partition_dim, self.partition_stride, rank, size)


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor` with zero rows added until there are `rows`."""
    missing = rows - tensor.shape[0]
    assert missing >= 0, (tuple(tensor.shape), rows)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def _same(name: str, *shape: int) -> HuggingFaceTensor:
    return HuggingFaceTensor(name, shape, name, shape)


def _vocabulary_rule(name: str, source: str, model: ModelConfig, padded: int) -> WeightRule:
    assert model.vocab_size is not None, "the vocabulary size is not known yet"
    tensor = _same(source, model.vocab_size, model.hidden_size)
    return WeightRule(name, (tensor,), partition_dim=0, padded_rows=padded)


def _attention_rules(model: ModelConfig, layer: int) -> Iterator[WeightRule]:
    here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
    hidden, query_rows = model.hidden_size, model.num_attention_heads * model.head_dim
    key_rows = model.query_groups * model.head_dim
    yield WeightRule(f"{here}.input_layernorm.weight", (_same(f"{there}.input_layernorm.weight", hidden),), layer)
    yield WeightRule(
        f"{here}.self_attention.linear_qkv.weight",
        (
            _same(f"{there}.self_attn.q_proj.weight", query_rows, hidden),
            _same(f"{there}.self_attn.k_proj.weight", key_rows, hidden),
            _same(f"{there}.self_attn.v_proj.weight", key_rows, hidden),
        ),
        layer,
        partition_dim=0,
        groups=model.query_groups,
    )
    yield WeightRule(
        f"{here}.self_attention.linear_proj.weight",
        (_same(f"{there}.self_attn.o_proj.weight", hidden, query_rows),),
        layer,
        partition_dim=1,
    )


def _expert_rules(model: ModelConfig, layer: int) -> Iterator[WeightRule]:
    here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
    experts, hidden, ffn = model.num_experts, model.hidden_size, model.ffn_hidden_size
    yield WeightRule(
        f"{here}.pre_mlp_layernorm.weight", (_same(f"{there}.post_attention_layernorm.weight", hidden),), layer
    )
    gate = HuggingFaceTensor(
        f"{there}.block_sparse_moe.gate.weight", (experts, hidden), f"{there}.mlp.gate.weight", (experts, hidden)
    )
    yield WeightRule(f"{here}.mlp.router.weight", (gate,), layer)
    gate_up, down = f"{there}.mlp.experts.gate_up_proj", f"{there}.mlp.experts.down_proj"
    gate_up_shape, down_shape = (experts, 2 * ffn, hidden), (experts, hidden, ffn)
    for expert in range(experts):
        local = f"{here}.mlp.experts.local_experts.{expert}"
        on_disk = f"{there}.block_sparse_moe.experts.{expert}"
        yield WeightRule(
            f"{local}.linear_fc1.weight",
            (
                HuggingFaceTensor(f"{on_disk}.w1.weight", (ffn, hidden), gate_up, gate_up_shape, expert),
                HuggingFaceTensor(f"{on_disk}.w3.weight", (ffn, hidden), gate_up, gate_up_shape, expert, ffn),
            ),
            layer,
            partition_dim=0,
            partition_stride=2,
        )
        w2 = HuggingFaceTensor(f"{on_disk}.w2.weight", (hidden, ffn), down, down_shape, expert)
        yield WeightRule(f"{local}.linear_fc2.weight", (w2,), layer, partition_dim=1)


def mixtral_weights(model: ModelConfig, padded_vocab_size: int | None = None) -> Iterator[WeightRule]:
    """Every weight of `model`, embedding first, then layer by layer; the vocabulary padded to `padded_vocab_size`."""
    assert model.vocab_size is not None, "the vocabulary size is not known yet"
    padded = padded_vocab_size or model.vocab_size
    yield _vocabulary_rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", model, padded)
    for layer in range(model.num_layers):
        yield from _attention_rules(model, layer)
        yield from _expert_rules(model, layer)
    yield WeightRule("decoder.final_layernorm.weight", (_same("model.norm.weight", model.hidden_size),))
    yield _vocabulary_rule("output_layer.weight", "lm_head.weight", model, padded)


def stage_weights(
    model: ModelConfig, stage: int, stages: int, padded_vocab_size: int | None = None
) -> Iterator[tuple[str, WeightRule]]:
    """The weights of pipeline stage `stage` of `stages` with their names there, where layers count from 0.

    The first stage holds the embedding, the last the final norm and the output layer. Raises ValueError if the
    layers do not divide.
    """
    if model.num_layers % stages:
        raise ValueError(f"{model.num_layers} layers are not divisible by the pipeline-parallel size {stages}")
    per_stage = model.num_layers // stages
    first = stage * per_stage
    for rule in mixtral_weights(model, padded_vocab_size):
        if rule.layer is None:
            if stage == (0 if rule.name.startswith("embedding.") else stages - 1):
                yield rule.name, rule
        elif first <= rule.layer < first + per_stage:
            prefix = f"decoder.layers.{rule.layer}."
            yield f"decoder.layers.{rule.layer - first}.{rule.name.removeprefix(prefix)}", rule
