"""Saver: Megatron-LM's `torch_dist` format, which its `--load` takes at any parallel layout."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from megatron.core.atomic_files import atomic_writer
from megatron.core.interchange import CHECKPOINT_VERSION, Layout, model_args_namespace
from megatron.core.interchange.element_types import STORED_AS, Array
from megatron.core.interchange.layout import replace_step
from megatron.core.interchange.torch_dist import METADATA_FILE, Chunk, Place, SavedTensor, encode_metadata
from megatron.core.interchange.torch_dist.names import IMPLEMENTATIONS, key_of, state_keys
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from tools.checkpoint import saver_mixtral
from tools.checkpoint.saver_mixtral import extra_args, model_to_write, release_folder, tokenizer_to_name
from tools.checkpoint.stream import (
    CheckedSource,
    Destination,
    check_disk,
    planned_bytes,
    print_plan,
    rows_at_a_time,
    transfer,
)
from tools.checkpoint.torch_writer import ChunksFile, torch_bytes
from tools.checkpoint.writers import TensorPlan

_BYTES_OF_FILE = 1 << 30
_MOST_FILES = 16
_BACKEND = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'

check = saver_mixtral.check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model that is to read it, and the tokenizer to name in the checkpoint."""
    saver_mixtral.add_tokenizer_arguments(parser)
    parser.add_argument(
        "--target-transformer-impl",
        choices=IMPLEMENTATIONS,
        default=IMPLEMENTATIONS[0],
        help="the --transformer-impl of the Megatron-LM run that will load it (default: %(default)s)",
    )


def save(source: CheckedSource, args: argparse.Namespace) -> None:
    """Writes the source's weights to `args.save_dir`/release; nothing is left of a failed attempt.

    Raises ValueError if the folder is not empty or the disk too small.
    """
    description, target = source.description, check(args)
    model = model_to_write(description, args)
    extra = extra_args(description, tokenizer_to_name(description, args))
    content: dict[str, object] = {
        "args": model_args_namespace(model, Layout(), description.seq_length, extra),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
    }
    rules = list(mixtral_weights(model, model.padded_vocab_size(1)))
    writer = ChunksWriter(rules, description.dtype, args.target_transformer_impl)
    if source.dry_run:
        print_plan(source, writer, rules)
    check_disk(target, planned_bytes(writer, rules), report=source.dry_run)
    if source.dry_run:
        return
    with release_folder(target) as folder:
        writer.open(folder, state_keys(model.num_layers, model.num_experts, args.target_transformer_impl))
        transfer(source, writer, rules)
        writer.finish(folder, model.num_layers, model.num_experts)
        source.check_complete()
        _write(folder / "common.pt", torch_bytes(content))
        _write(folder / "metadata.json", _BACKEND)
        replace_step(target.folder, "release", {path.name for path in folder.iterdir()})
    print(f"wrote {target.name / 'release'}: torch_dist, {description.dtype}, weights only, for any layout")


def _write(path: Path, content: bytes) -> None:
    with atomic_writer(path) as file:
        file.write(content)


class ChunksWriter:
    """`.distcp` files: a chunk for each layer and expert of a key, spread over several files of about the same size."""

    def __init__(self, rules: list[WeightRule], dtype: str, implementation: str) -> None:
        self._rules, self._dtype = rules, dtype
        self._keys = {rule.name: key_of(rule, implementation) for rule in rules}
        sizes = {rule.name: math.prod(rule.shape) * STORED_AS[dtype].itemsize for rule in rules}
        count = min(max(sum(sizes.values()) // _BYTES_OF_FILE, 1), _MOST_FILES, len(rules))
        filled = [0] * count
        self._file_of: dict[str, int] = {}
        for rule in rules:
            number = self._file_of[rule.name] = filled.index(min(filled))
            filled[number] += sizes[rule.name]
        self._files: list[ChunksFile] = []
        self._states: list[str] = []

    def _file(self, number: int) -> str:
        return f"__0_{number}.distcp"

    def open(self, folder: Path, states: list[str]) -> None:
        """Makes the files, with nothing in them yet but the objects that `states` names, which are empty."""
        self._states, nothing = states, torch_bytes([None])
        for number in range(max(self._file_of.values()) + 1):
            plans = [
                (TensorPlan(rule.name, rule.shape, self._dtype), len(self._keys[rule.name].at))
                for rule in self._rules
                if self._file_of[rule.name] == number
            ]
            objects = dict.fromkeys(states if number == 0 else (), nothing)
            self._files.append(ChunksFile(folder / self._file(number), plans, objects))

    def finish(self, folder: Path, layers: int, experts: int) -> None:
        """Writes what describes the files. Raises ValueError naming a weight of which not every row was written."""
        for file in self._files:
            file.check_complete()
        chunks: dict[str, list[Chunk]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in self._rules:
            key, number = self._keys[rule.name], self._file_of[rule.name]
            place = Place(self._file(number), *self._files[number].extents[rule.name])
            start, size = (*key.at, *(0 for _ in rule.shape)), (*(1 for _ in key.at), *rule.shape)
            chunks.setdefault(key.name, []).append(Chunk(start, size, place))
            shapes[key.name] = (*(layers, experts)[: len(key.at)], *rule.shape)
        tensors = {key: SavedTensor(self._dtype, shapes[key], tuple(found)) for key, found in chunks.items()}
        objects = {key: Place(self._file(0), *self._files[0].extents[key]) for key in self._states}
        _write(folder / METADATA_FILE, encode_metadata(tensors, objects))

    def chunks(self, rule: WeightRule) -> Iterator[range]:
        """The rows of a weight, cut as they are to be read."""
        return rule.chunks(1, rows_at_a_time(rule, self._dtype))

    def destinations(self, rule: WeightRule) -> list[Destination]:
        """Where a weight goes: one chunk."""
        key = self._keys[rule.name]
        nbytes = math.prod(rule.shape) * STORED_AS[self._dtype].itemsize
        part = f"chunk {', '.join(map(str, key.at))}" if key.at else ""
        return [Destination(f"release/{self._file(self._file_of[rule.name])}", key.name, nbytes, part)]

    def write(self, rule: WeightRule, rows: range, array: Array) -> None:
        """Puts rows of a weight into its chunk."""
        self._files[self._file_of[rule.name]].append(rule.name, array)
