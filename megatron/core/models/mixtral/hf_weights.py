"""The one table between Hugging Face's names for Mixtral's weights and Megatron's.

Every weight of the Megatron model is one `WeightRule`: where it comes from in the Hugging Face checkpoint, how its
sources are put together, and how it is cut over tensor-parallel ranks. Names are global: layers are numbered through
the whole model and experts have one name each. Any rows of a weight are made of some rows of its sources, and belong
to one rank's part or to the same rows of every part, so that tools can move a model a few rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.config import ModelConfig
from megatron.core.stages import Stage


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
    expert: int | None = None
    """Expert it belongs to, counted through the layer."""
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

    def part_shape(self, size: int) -> tuple[int, ...]:
        """Shape of a part of `size`. Raises ValueError if the tensor cannot be cut into so many."""
        shape = list(self.shape)
        if self.partition_dim is not None:
            interleaved = len(self.sources) > 1 and self.partition_stride == 1
            units = self.groups if interleaved else shape[self.partition_dim] // self.partition_stride
            if units % size:
                raise ValueError(f"{self.name}: {units} rows, columns or groups are not divisible by {size} ranks")
            shape[self.partition_dim] //= size
        return tuple(shape)

    def chunks(self, parts: int, at_most: int) -> Iterator[range]:
        """Row ranges of the whole tensor, in order, of about `at_most` rows: what is moved at a time.

        None crosses the border between two parts of `parts`, or between two blocks, or divides a group.
        """
        rows, unit = self.shape[0], self.shape[0] // self.groups
        cells = parts * self.partition_stride if self.partition_dim == 0 else 1
        step = max(at_most // unit, 1) * unit
        for start in range(0, rows, rows // cells):
            for first in range(start, start + rows // cells, step):
                yield range(first, min(first + step, start + rows // cells))

    def owner(self, rows: range, size: int) -> int:
        """Which part of `size` holds `rows` of a tensor that is cut by rows; the rows are as `chunks` gives them."""
        block = self.shape[0] // self.partition_stride
        return rows.start % block // (block // size)

    def part_rows(self, rank: int, size: int) -> list[range]:
        """The rows of the whole tensor that part `rank` of `size` of a tensor cut by rows has, in its order."""
        block = self.shape[0] // self.partition_stride
        length = block // size
        starts = (start + rank * length for start in range(0, self.shape[0], block))
        return [range(start, start + length) for start in starts]

    def source_rows(self, rows: range) -> list[tuple[HuggingFaceTensor, range]]:
        """The rows of the sources that `rows` of the whole tensor are made of; none of vocabulary padding."""
        if self.padded_rows is not None:
            length = self.sources[0].shape[0]
            return [(self.sources[0], range(min(rows.start, length), min(rows.stop, length)))]
        if self.groups > 1:
            unit = self.shape[0] // self.groups
            assert rows.start % unit == rows.stop % unit == 0, (self.name, rows)
            first, last = rows.start // unit, rows.stop // unit
            per_group = [(source, source.shape[0] // self.groups) for source in self.sources]
            return [(source, range(first * height, last * height)) for source, height in per_group]
        found, start = [], 0
        for source in self.sources:
            low, high = max(rows.start - start, 0), min(rows.stop - start, source.shape[0])
            if low < high:
                found.append((source, range(low, high)))
            start += source.shape[0]
        return found

    def source_views(self, tensor: Any, rows: range | None = None) -> list[Any]:
        """The parts of `tensor`, `rows` of this weight (all, if not given), that `source_rows` names, in its order.

        They are views of the same memory, of as many elements as the source's rows and in their order, so that either
        side can be filled from the other. `tensor` is a numpy array or torch tensor without gaps; rows of vocabulary
        padding are in no part.
        """
        pieces = self.source_rows(range(self.shape[0]) if rows is None else rows)
        if self.padded_rows is not None:
            return [tensor[: len(pieces[0][1])]]
        groups = len(tensor) * self.groups // self.shape[0] if self.groups > 1 else 1
        blocks = tensor.reshape(groups, -1, *self.shape[1:])
        views, start = [], 0
        for _, part in pieces:
            height = len(part) // groups
            views.append(blocks[:, start : start + height] if groups > 1 else tensor[start : start + height])
            start += height
        return views


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
            expert,
            partition_dim=0,
            partition_stride=2,
        )
        w2 = HuggingFaceTensor(f"{on_disk}.w2.weight", (hidden, ffn), down, down_shape, expert)
        yield WeightRule(f"{local}.linear_fc2.weight", (w2,), layer, expert, partition_dim=1)


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
    model: ModelConfig, stage: Stage, experts: range | None = None, padded_vocab_size: int | None = None
) -> Iterator[tuple[str, WeightRule]]:
    """The weights of one stage with their names there, where layers count from 0, as do the `experts` of a rank."""
    experts = experts or range(model.num_experts)
    for rule in mixtral_weights(model, padded_vocab_size):
        if rule.layer is None:
            if stage.has_embedding if rule.name.startswith("embedding.") else stage.has_output:
                yield rule.name, rule
        elif rule.layer in stage.layers and (rule.expert is None or rule.expert in experts):
            name = rule.name.replace(f".layers.{rule.layer}.", f".layers.{rule.layer - stage.layers.start}.")
            if rule.expert is not None:
                name = name.replace(f".{rule.expert}.linear", f".{rule.expert - experts.start}.linear")
            yield name, rule
