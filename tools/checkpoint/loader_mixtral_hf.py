"""Loader: a Mixtral model folder in Hugging Face's format, both spellings of its tensors, read slice by slice."""

import argparse
import math
import os
import re
from dataclasses import replace
from pathlib import Path

from megatron.core.interchange.element_types import STORED_AS, Array
from megatron.core.interchange.stored_tensor import LoadedTensor, StoredTensor
from megatron.core.models.mixtral.hf_config import model_config_from_hf, sliding_window_from_hf
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import HuggingFaceTensor, WeightRule
from tools.checkpoint.hf_files import HuggingFaceFolder
from tools.checkpoint.stream import Description, Source, common_dtype, config_dtype, list_some, rows_of

# Buffers that old versions of transformers saved with the weights; they follow from the config.
_BUFFERS = (".rotary_emb.inv_freq",)
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")
_EXPERT = re.compile(r"\.experts\.([0-9]+)\.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beyond --load-dir and --params-dtype."""


def open_source(args: argparse.Namespace) -> Source:
    """The model folder `args.load_dir`."""
    return HuggingFaceSource(Path(args.load_dir), args.params_dtype)


class HuggingFaceSource:
    """A model folder of which every tensor has its place in the Megatron model.

    Raises ValueError naming a tensor that is unknown, missing, there in both spellings, or of another shape.
    """

    def __init__(self, folder: Path, params_dtype: str | None = None, opened: HuggingFaceFolder | None = None) -> None:
        self._folder = opened or HuggingFaceFolder(folder)
        model = model_config_from_hf(self._folder.config)
        self._check_counts(model.num_layers, model.num_experts)
        dtypes = self._check_names(model.num_layers, [s for rule in mixtral_weights(model) for s in rule.sources])
        dtype = common_dtype(dtypes, params_dtype)
        window = sliding_window_from_hf(self._folder.config)
        tokenizer = any(os.path.lexists(folder / name) for name in ("tokenizer.json", "tokenizer.model"))
        self._description = Description(
            model=replace(model, params_dtype=config_dtype(dtype)),
            dtype=dtype,
            folder=folder,
            seq_length=min(model.max_position_embeddings, window or model.max_position_embeddings),
            sliding_window=window,
            tokenizer_model=str(folder.resolve()) if tokenizer else None,
        )

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""
        return self._description

    def _check_counts(self, layers: int, experts: int) -> None:
        """Raises ValueError if config.json counts more than the tensors do, before anything is done for each one."""
        matches = map(_LAYER.match, self._folder.tensors)
        counts = {
            "num_hidden_layers": (layers, len({match.group(1) for match in matches if match})),
            "num_local_experts": (experts, self._experts_there()),
        }
        for field, (said, there) in counts.items():
            if there is not None and said > there:
                raise ValueError(
                    f"{self._folder.folder}: config.json says {field} {said}, but there are tensors of {there}: files "
                    "are missing, or config.json is of another model"
                )

    def _experts_there(self) -> int | None:
        """Experts that some layer has tensors of; None if they are made up."""
        numbers, stacked = set(), 0
        for name, stored in self._folder.tensors.items():
            if match := _EXPERT.search(name):
                numbers.add(match.group(1))
            elif ".experts." in name and stored.shape and 0 not in stored.shape:
                stacked = max(stacked, stored.shape[0])
        return max(len(numbers), stacked)

    def _check_names(self, num_layers: int, sources: list[HuggingFaceTensor]) -> dict[str, str]:
        """Types of the tensors that are used, after every name and shape has been accounted for."""
        stored = self._folder.tensors
        where = self._folder.folder
        used: dict[str, str] = {}
        missing = []
        for source in sources:
            if source.name != source.fused_name and source.name in stored and source.fused_name in stored:
                raise ValueError(f"{where} has both {source.name} and {source.fused_name}: remove one of them")
            name, shape = self._name_and_shape(source)
            if name is None:
                continue
            if name not in stored:
                missing.append(source.name)
            elif stored[name].shape != shape:
                raise ValueError(f"{where}: {name} is of shape {stored[name].shape}, config.json asks for {shape}")
            else:
                used[name] = stored[name].dtype
        if missing:
            raise ValueError(f"{where} lacks {list_some(missing)} (config.json says {num_layers} layers)")
        unknown = sorted(name for name in stored if name not in used and not name.endswith(_BUFFERS))
        if unknown:
            raise ValueError(f"{where} has tensors that a Mixtral model does not: {list_some(unknown)}")
        return used

    def _name_and_shape(self, source: HuggingFaceTensor) -> tuple[str | None, tuple[int, ...]]:
        """Which tensor of the folder holds `source`; None if none does, and it is made up."""
        if source.name in self._folder.tensors:
            return source.name, source.shape
        return source.fused_name, source.fused_shape

    def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
        """Some rows of one Megatron weight, in the description's type; vocabulary padding is zero."""
        array = rows_of(rule, rows, self._description.dtype, out)
        for (source, part), view in zip(rule.source_rows(rows), rule.source_views(array, rows), strict=True):
            self._located(source).read_into(view, part, self._description.dtype)
        if rule.padded_rows is not None:
            array[max(rule.sources[0].shape[0] - rows.start, 0) :] = 0
        return array

    def _located(self, source: HuggingFaceTensor) -> StoredTensor | LoadedTensor:
        """The tensor that holds `source`: under its own name, or an expert's as a part of transformers 5's stack."""
        name, _ = self._name_and_shape(source)
        assert name is not None, source
        stored = self._folder.tensors[name]
        if source.expert is None or name != source.fused_name:
            return stored
        if isinstance(stored, LoadedTensor):
            part = stored.array[source.expert, source.first_row : source.first_row + source.shape[0]]
            return LoadedTensor(stored.file, stored.dtype, part)
        strides = (math.prod(stored.shape[1:]), stored.shape[2]) if stored.stride is None else stored.stride
        skip = source.expert * strides[0] + source.first_row * strides[1]
        return replace(
            stored,
            shape=source.shape,
            offset=stored.offset + skip * STORED_AS[stored.dtype].itemsize,
            stride=None if stored.stride is None else stored.stride[1:],
        )

    def origin(self, rule: WeightRule) -> list[str]:
        """Where a weight comes from."""
        found = []
        for source in rule.sources:
            name, _ = self._name_and_shape(source)
            if name is None:
                found.append("drawn anew")
                continue
            stacked = source.expert is not None and name == source.fused_name
            part = f"[{source.expert}, {source.first_row}:{source.first_row + source.shape[0]}]" if stacked else ""
            found.append(f"{self._folder.tensors[name].file.name}: {name}{part}")
        return found
