"""Loader: a Mixtral checkpoint in Megatron's format, converted or trained, of any parallel layout."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron.core.config import ModelConfig
from megatron.core.interchange import (
    CHECKPOINT_FILE,
    Step,
    available_layout,
    find_checkpoint,
)
from megatron.core.interchange.element_types import Array
from megatron.core.interchange.folder_kind import is_sharded, is_torch_dist
from megatron.core.interchange.stored_tensor import bytes_of, open_torch, stored_tensor
from megatron.core.models.mixtral.weights import mixtral_table
from megatron.core.models.weight_table import WeightRule
from megatron.core.stages import Stage
from tools.checkpoint.megatron_names import Stored, count_layers, plain_names
from tools.checkpoint.stream import (
    Description,
    Source,
    check_counts,
    common_dtype,
    describe_training,
    list_some,
    model_of,
    rows_of,
    with_vocabulary,
)
from tools.checkpoint.torch_dist_source import TorchDistSource

if TYPE_CHECKING:
    from tools.checkpoint.sharded_source import ShardedSource


def step(text: str) -> Step:
    """An iteration, or `release` (an argparse type)."""
    if text == "release":
        return "release"
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither an iteration nor 'release'")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which step to read, and what the checkpoint may not know about itself."""
    parser.add_argument("--iteration", type=step, help="step to read instead of the one the tracker names, or release")
    parser.add_argument(
        "--true-vocab-size",
        type=int,
        help="vocabulary size before padding, for checkpoints of other programs that only store the padded size",
    )


def open_source(args: argparse.Namespace) -> Source:
    """The checkpoint `args.load_dir`."""
    return open_megatron(
        Path(args.load_dir),
        iteration=args.iteration,
        true_vocab_size=args.true_vocab_size,
        params_dtype=args.params_dtype,
    )


def open_megatron(
    path: Path,
    *,
    iteration: Step | None = None,
    true_vocab_size: int | None = None,
    fallback_vocab_size: int | None = None,
    params_dtype: str | None = None,
    layout: tuple[int | None, int | None, int | None] = (None, None, None),
) -> "PerRankSource | ShardedSource | TorchDistSource":
    """The step that `path` and `iteration` name, of any format; see `PerRankSource` for the rest.

    A sharded checkpoint of ours knows its vocabulary size. It and Megatron-LM's `torch_dist` are read at any layout;
    sizes in `layout` are compared with those of the run that saved it.
    """
    folder, found = find_checkpoint(path, iteration)
    if is_torch_dist(folder):
        shared = TorchDistSource(
            folder,
            iteration=found,
            true_vocab_size=true_vocab_size,
            fallback_vocab_size=fallback_vocab_size,
            params_dtype=params_dtype,
        )
        _check_layout(folder, layout, shared.saved_sizes)
        return shared
    if is_sharded(folder):
        from tools.checkpoint.sharded_source import ShardedSource  # needs torch, which the other formats do not

        source = ShardedSource(folder, iteration=found, params_dtype=params_dtype)
        _check_layout(folder, layout, source.saved_sizes)
        return source
    return PerRankSource(
        path,
        iteration=iteration,
        true_vocab_size=true_vocab_size,
        fallback_vocab_size=fallback_vocab_size,
        params_dtype=params_dtype,
        layout=layout,
    )


def _check_layout(folder: Path, wanted: Sequence[int | None], sizes: Sequence[int]) -> None:
    """Raises ValueError if the caller believes in another (tensor, pipeline, expert) size than the checkpoint has."""
    believed = [size if given is None else given for given, size in zip(wanted, sizes, strict=True)]
    if believed != list(sizes):
        raise ValueError(
            f"{folder} was saved at tensor-parallel size {sizes[0]}, pipeline-parallel size {sizes[1]}, "
            f"expert-parallel size {sizes[2]}, not at tensor x pipeline x expert parallel sizes "
            f"{' x '.join(map(str, believed))}: leave these sizes out, or give the checkpoint they belong to"
        )


class _Held(NamedTuple):
    """A part of a weight in a rank's file."""

    file: Path
    name: str
    """Its name there."""
    tensor: Stored


class _RankFile(NamedTuple):
    """What one rank's file holds."""

    path: Path
    chunks: list[dict[str, Stored]]
    """The weights of each virtual stage, as they are named in the file."""


class PerRankSource:
    """A step's folder whose files hold the parts of every weight, and nothing else.

    `layout` is the (tensor, pipeline, expert) size the caller believes it has; `fallback_vocab_size` counts only if the
    checkpoint does not store its true vocabulary size and `true_vocab_size` is not given. Raises ValueError
    naming the file and the tensor for any that is unknown, missing or of another shape.
    """

    def __init__(
        self,
        path: Path,
        *,
        iteration: Step | None = None,
        true_vocab_size: int | None = None,
        fallback_vocab_size: int | None = None,
        params_dtype: str | None = None,
        layout: tuple[int | None, int | None, int | None] = (None, None, None),
    ) -> None:
        self.folder, self.iteration = find_checkpoint(path, iteration)
        self.layout = available_layout(self.folder)
        _check_layout(self.folder, layout, (self.layout.tensor, self.layout.pipeline, self.layout.expert))
        files = {}
        args = argparse.Namespace()
        for ranks in self.layout.ranks():
            stored_args, files[ranks] = self._load(self.folder / self.layout.folder(*ranks) / CHECKPOINT_FILE)
            args = stored_args if ranks == (0, 0, 0) else args
        model = model_of(args, self.folder, true_vocab_size)
        self._experts = model.num_experts // self.layout.expert
        weights = {
            (ranks, chunk): plain_names(file.path, found, self._experts)
            for ranks, file in files.items()
            for chunk, found in enumerate(file.chunks)
        }
        embedding = weights[(0, 0, 0), 0].get("embedding.word_embeddings.weight")
        self._padded = (embedding[1].shape[0] if embedding else 0) * self.layout.tensor
        model = with_vocabulary(model, self._padded, fallback_vocab_size)
        self._parts: dict[str, dict[int, list[_Held]]] = {}
        dtypes: dict[str, str] = {}
        self.stages = self._stages(model, weights)
        """Which layers each (pipeline rank, virtual stage) has."""
        for (ranks, chunk), found in weights.items():
            dtypes |= self._check_weights(model, self.stages[ranks[1], chunk], ranks, files[ranks].path, found)
        dtype = common_dtype(dtypes, params_dtype)
        self._description = describe_training(args, model, dtype, self.folder)

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""
        return self._description

    @staticmethod
    def _load(path: Path) -> tuple[argparse.Namespace, _RankFile]:
        content, records = open_torch(path)
        keys = sorted(
            (key for key in content if re.fullmatch("model[0-9]*", str(key))), key=lambda key: (len(key), key)
        )
        args, models = content.get("args"), [content[key] for key in keys]
        if not isinstance(args, argparse.Namespace) or not models or not all(isinstance(m, dict) for m in models):
            raise ValueError(f"{path} has no 'args' and 'model': it is not a checkpoint of one model part")
        chunks: list[dict[str, Stored]] = []
        for weights in models:
            if not all(isinstance(name, str) for name in weights):
                raise ValueError(f"{path}: the names of its tensors are not text")
            tensors = {name: value for name, value in weights.items() if not name.endswith("_extra_state")}
            chunks.append({name: stored_tensor(path, records, name, value) for name, value in tensors.items()})
        return args, _RankFile(path, chunks)

    def _stages(
        self, model: ModelConfig, weights: dict[tuple[tuple[int, int, int], int], dict[str, tuple[str, Stored]]]
    ) -> dict[tuple[int, int], Stage]:
        """Which layers each (pipeline rank, chunk) has, from what its files hold: chunk 0 of all ranks comes first."""
        counts: dict[tuple[int, int], int] = {}
        for (ranks, chunk), found in weights.items():
            key = (chunk, ranks[1])
            counts[key] = max(counts.get(key, 0), count_layers(list(found)))
        stages, start = {}, 0
        for chunk, rank in sorted(counts):
            layers = range(start, start + counts[chunk, rank])
            start = layers.stop
            stages[rank, chunk] = Stage(
                layers, has_embedding=(chunk, rank) == (0, 0), has_output=(chunk, rank) == max(counts)
            )
        if start != model.num_layers:
            found_counts = ", ".join(str(counts[key]) for key in sorted(counts))
            raise ValueError(
                f"{self.folder}: its stages hold {found_counts} layers, but the checkpoint says num_layers is "
                f"{model.num_layers}"
            )
        return stages

    def _check_weights(
        self,
        model: ModelConfig,
        stage: Stage,
        ranks: tuple[int, int, int],
        path: Path,
        found: dict[str, tuple[str, Stored]],
    ) -> dict[str, str]:
        """Types of a file's tensors, after every name and shape has been accounted for."""
        check_counts(len(stage.layers), self._experts, len(found), path)
        experts = range(ranks[2] * self._experts, (ranks[2] + 1) * self._experts)
        rules = dict(mixtral_table(model, self._padded).named_weights(stage, experts))
        missing, unknown = sorted(set(rules) - set(found)), sorted(set(found) - set(rules))
        if missing:
            raise ValueError(f"{path} lacks {list_some(missing)}")
        if unknown:
            raise ValueError(f"{path} has tensors that a Mixtral model does not: {list_some(unknown)}")
        dtypes = {}
        for name, rule in rules.items():
            size = self.layout.tensor if rule.expert is None else self.layout.etp
            spelling, stored = found[name]
            if stored.shape != rule.part_shape(size):
                raise ValueError(
                    f"{path}: {spelling} is of shape {list(stored.shape)}, expected {list(rule.part_shape(size))}"
                )
            part = ranks[0] % size if rule.partition_dim is not None else 0
            held = self._parts.setdefault(rule.name, {}).setdefault(part, [])
            held.append(_Held(path, spelling, stored))
            dtypes[f"{spelling} in {path}"] = stored.dtype
        return dtypes

    def origin(self, rule: WeightRule) -> list[str]:
        """Where a weight comes from."""
        parts = self._parts[rule.name]
        return [
            f"{held.file.parent.name}/{held.file.name}: {held.name}"
            for held in (parts[rank][0] for rank in sorted(parts))
        ]

    def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
        """Some rows of one Megatron weight, in the description's type; vocabulary padding is zero."""
        array = rows_of(rule, rows, self._description.dtype, out)
        if rule.padded_rows is None:
            self._read(rule, rows, array)
            return array
        length = rule.sources[0].shape[0]  # rows after it are padding, here and there of different length
        real = range(min(rows.start, length), min(rows.stop, length))
        self._read(replace(rule, padded_rows=self._padded), real, array[: len(real)])
        array[len(real) :] = 0
        return array

    def _read(self, rule: WeightRule, rows: range, array: Array) -> None:
        parts = sorted(self._parts[rule.name])
        if rule.partition_dim == 0:
            start = 0
            for rank, local in self._overlaps(rule, rows):
                self._read_part(rule, rank, local, array[start : start + len(local)])
                start += len(local)
        elif len(parts) == 1:
            self._read_part(rule, parts[0], rows, array)
        else:
            for rank, columns in zip(parts, np.split(array, len(parts), axis=1), strict=True):
                self._read_part(rule, rank, rows, columns)

    def _overlaps(self, rule: WeightRule, rows: range) -> Iterator[tuple[int, range]]:
        """The parts of a weight cut by rows that hold `rows`, and where in them, in order."""
        found = []
        size = len(self._parts[rule.name])
        for rank in range(size):
            before = 0
            for held in rule.part_rows(rank, size):
                low, high = max(rows.start, held.start), min(rows.stop, held.stop)
                if low < high:
                    found.append((low, rank, range(before + low - held.start, before + high - held.start)))
                before += len(held)
        yield from ((rank, local) for _, rank, local in sorted(found, key=lambda entry: entry[0]))

    def _read_part(self, rule: WeightRule, rank: int, rows: range, array: Array) -> None:
        """Rows of one part; every other file that has the same part must have the same bits."""
        first, *copies = self._parts[rule.name][rank]
        first.tensor.read_into(array, rows, self._description.dtype, in_order=rule.padded_rows is None)
        for copy in copies:
            sums = first.tensor.checksum, copy.tensor.checksum
            if None not in sums:
                same = sums[0] == sums[1]
            else:
                same = bytes_of(first.tensor.read(rows)) == bytes_of(copy.tensor.read(rows))
            if not same:
                raise ValueError(
                    f"{self.folder}: {rule.name} differs between ranks: {first.file.parent.name} and "
                    f"{copy.file.parent.name}"
                )
