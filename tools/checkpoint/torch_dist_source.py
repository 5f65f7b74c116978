"""Weights of a checkpoint in Megatron-LM's `torch_dist` format, which is the same for every layout."""

import re
from pathlib import Path

from megatron.core.interchange import Layout, Step, model_config_from_args
from megatron.core.interchange.element_types import STORED_AS, Array
from megatron.core.interchange.torch_dist import CheckpointFolder, saved_arguments
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from megatron.core.stages import whole_model
from tools.checkpoint.stream import (
    Description,
    check_counts,
    common_dtype,
    describe_training,
    list_some,
    rows_of,
    saved_sizes,
    with_vocabulary,
)
from tools.checkpoint.torch_dist_names import keys_of

_PREFIX = re.compile(r"^(?:(?:model|module)\.)+")
# Kept beside the weights; TransformerEngine's extra state is empty unless it trains in FP8.
_NO_WEIGHTS = re.compile(
    r"((chained_[0-9]+\.)?optimizer|rng_state|rerun_state_machine_state|common_state|opt_param_scheduler)\b.*|.*\._extra_state(/.*)?"
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
        self._keys = {_PREFIX.sub("", key): key for key in self._checkpoint.catalog.tensors}
        if len(self._keys) < len(self._checkpoint.catalog.tensors):
            raise ValueError(f"{folder} holds the weights of several models")
        model = model_config_from_args(args, true_vocab_size)
        check_counts(model.num_layers, model.num_experts, self._count(), folder)
        embedding = self._keys.get("embedding.word_embeddings.weight")
        padded = self._checkpoint.shape(embedding)[0] if embedding is not None else 0
        model = with_vocabulary(model, padded, fallback_vocab_size)
        rules = list(mixtral_weights(model, padded or None))
        self._places = {rule.name: self._place(rule) for rule in rules}
        self._check(model.num_layers, model.num_experts, rules)
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

    def _count(self) -> int:
        """Weights in the folder, each layer's and expert's counted."""
        tensors = self._checkpoint.catalog.tensors
        return sum(max(len(tensors[key].chunks), 1) for key in self._keys.values())

    def _place(self, rule: WeightRule) -> tuple[str, tuple[int, ...]]:
        """The key that holds a weight, and its indices along the leading axes."""
        keys = keys_of(rule)
        for key in keys:
            if key.name in self._keys:
                return self._keys[key.name], key.at
        raise ValueError(f"{self.folder} lacks {' or '.join(dict.fromkeys(key.name for key in keys))}")

    def _check(self, layers: int, experts: int, rules: list[WeightRule]) -> None:
        used = {key for key, _ in self._places.values()}
        unknown = sorted(key for name, key in self._keys.items() if key not in used and not _NO_WEIGHTS.fullmatch(name))
        if unknown:
            raise ValueError(f"{self.folder} has tensors that a Mixtral model does not: {list_some(unknown)}")
        for rule in rules:
            key, at = self._places[rule.name]
            axes = (layers, experts)[-len(at) :] if at and rule.expert is not None else (layers,) * len(at)
            if self._checkpoint.shape(key) != (*axes, *rule.shape):
                raise ValueError(
                    f"{self.folder}: {key} is of shape {list(self._checkpoint.shape(key))}, "
                    f"expected {[*axes, *rule.shape]}"
                )
            if self._checkpoint.dtype(key) not in STORED_AS:
                raise ValueError(
                    f"{self.folder}: {key} is of type {self._checkpoint.dtype(key)}: only {', '.join(STORED_AS)} "
                    "are supported"
                )
