"""Weights of a checkpoint in Megatron-LM's `torch_dist` format, which is the same for every layout."""

import sys
from pathlib import Path

from megatron.core.interchange import Layout, Step
from megatron.core.interchange.element_types import Array
from megatron.core.interchange.torch_dist import CheckpointFolder, ModelKeys, saved_arguments
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from megatron.core.stages import whole_model
from tools.checkpoint.stream import (
    Description,
    check_counts,
    common_dtype,
    describe_training,
    model_of,
    rows_of,
    saved_sizes,
    with_vocabulary,
)


class TorchDistSource:
    """A step's folder, whose names and shapes of weights have all been checked.

    Raises ValueError naming the file or the key that is damaged, unknown, missing or of another shape.
    """

    layout = Layout()
    """What it is read at."""

    def __init__(
        self,
        folder: Path,
        *,
        iteration: Step | None = None,
        true_vocab_size: int | None = None,
        fallback_vocab_size: int | None = None,
        params_dtype: str | None = None,
    ) -> None:
        self.folder, self.iteration = folder, iteration
        self._checkpoint = CheckpointFolder(folder)
        args = saved_arguments(self._checkpoint)
        self.saved_sizes = saved_sizes(args)
        """Tensor-, pipeline- and expert-parallel size of the run that saved it."""
        keys = ModelKeys(self._checkpoint)
        model = model_of(args, folder, true_vocab_size)
        check_counts(model.num_layers, model.num_experts, keys.tensors(), folder)
        embedding = keys.key("embedding.word_embeddings.weight")
        padded = self._checkpoint.shape(embedding)[0] if embedding is not None else 0
        model = with_vocabulary(model, padded, fallback_vocab_size)
        rules = list(mixtral_weights(model, padded or None))
        keys.check(rules, model.num_layers, model.num_experts)
        if keys.has_state or keys.has_bound_state:
            print(f"note: the optimizer's state in {folder} is left out: only weights are converted", file=sys.stderr)
        self._places = {rule.name: keys.place(rule) for rule in rules}
        self.stages = {(0, 0): whole_model(model.num_layers)}
        used = {key for key, _ in self._places.values()}
        dtype = common_dtype({key: self._checkpoint.dtype(key) for key in sorted(used)}, params_dtype)
        self._description = describe_training(args, model, dtype, folder)

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""
        return self._description

    def origin(self, rule: WeightRule) -> list[str]:
        """Where a weight comes from."""
        key, at = self._places[rule.name]
        return [f"{file}: {key}{list(at) if at else ''}" for file in self._checkpoint.files(key, at)]

    def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
        """Some rows of one Megatron weight, in the description's type; vocabulary padding is zero."""
        array = rows_of(rule, rows, self._description.dtype, out)
        key, at = self._places[rule.name]
        length = rule.shape[0] if rule.padded_rows is None else rule.sources[0].shape[0]
        real = range(min(rows.start, length), min(rows.stop, length))
        whole = rule.padded_rows is None  # otherwise the last rows of the file are never read
        self._checkpoint.read_into(array[: len(real)], key, at, real, self._description.dtype, in_order=whole)
        array[len(real) :] = 0
        return array
