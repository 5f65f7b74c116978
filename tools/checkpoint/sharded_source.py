"""Weights of a checkpoint in the sharded format (`--ckpt-format sharded`), the same for every layout."""

from pathlib import Path
from types import SimpleNamespace

from megatron.core.dist_checkpointing import CheckpointReader
from megatron.core.interchange import Layout
from megatron.core.interchange.element_types import Array, cast, dtype_name, from_torch
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from megatron.core.stages import whole_model
from tools.checkpoint.stream import (
    Description,
    check_counts,
    common_dtype,
    describe_training,
    list_some,
    model_of,
    rows_of,
    saved_sizes,
)


class ShardedSource:
    """A step's folder, whose names and shapes of weights have all been checked; `verify` reads them.

    Raises ValueError naming the file or the tensor that is damaged, unknown, missing or of another shape.
    """

    layout = Layout()
    """What it is read at."""

    def __init__(self, folder: Path, *, iteration: int | str | None = None, params_dtype: str | None = None) -> None:
        self.folder, self.iteration = folder, iteration
        self._reader = CheckpointReader(folder)
        args = SimpleNamespace(**self._reader.arguments)
        self.saved_sizes = saved_sizes(args)
        """Tensor-, pipeline- and expert-parallel size of the run that saved it."""
        model = model_of(args, folder)  # type: ignore[arg-type]
        found = self._reader.tensors("weight")
        check_counts(model.num_layers, model.num_experts, len(found), folder)
        self.stages = {(0, 0): whole_model(model.num_layers)}
        rules = {rule.name: rule for rule in mixtral_weights(model)}
        missing, unknown = sorted(rules.keys() - found.keys()), sorted(found.keys() - rules.keys())
        if missing or unknown:
            problem = f"lacks {list_some(missing)}" if missing else f"has tensors unknown here: {list_some(unknown)}"
            raise ValueError(f"{folder} {problem}")
        for name, rule in rules.items():
            if found[name].shape != rule.shape:
                raise ValueError(f"{folder}: {name} is of shape {found[name].shape}, expected {rule.shape}")
        dtype = common_dtype({name: dtype_name(tensor.dtype) for name, tensor in found.items()}, params_dtype)
        self._description = describe_training(args, model, dtype, folder)

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""
        return self._description

    def verify(self) -> None:
        """Compares the checksums of all weights. Raises ValueError naming the file and the tensor that was altered."""
        self._reader.verify(("weight",))

    def origin(self, rule: WeightRule) -> list[str]:
        """Where a weight comes from."""
        return sorted({f"{stored.file}: {rule.name}" for stored in self._reader.tensors("weight")[rule.name].blocks})

    def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
        """Some rows of one Megatron weight, in the description's type; vocabulary padding is zero."""
        stored = self._reader.metadata.tensors["weight", rule.name]
        real = range(min(rows.start, stored.shape[0]), min(rows.stop, stored.shape[0]))
        array = rows_of(rule, rows, self._description.dtype, out)
        found = from_torch(self._reader.read_rows(rule.name, real))
        array[: len(real)] = cast(found, dtype_name(stored.dtype), self._description.dtype)
        array[len(real) :] = 0
        return array
