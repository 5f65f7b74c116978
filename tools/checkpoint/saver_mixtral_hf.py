"""Saver: a Mixtral model folder that transformers loads, with the config and tokenizer of the model it came from.

In a new folder: everything is written next to it and moved into place at the end. In one that is there and empty:
everything is written to a hidden folder in it and moved up at the end, config.json last. In the folder of the config
itself: new shards are written to a hidden folder in it, moved in under names that no old file has, and take effect with
one rename or removal (the index, or the single file that transformers prefers to it); until then the folder is the old
model, from then on the new one. config.json follows (only its type of the weights can differ, and transformers casts to
it), then stale weight files are removed. A kill leaves a loadable folder, at worst with files nothing refers to.
"""

import argparse
import codecs
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.core.atomic_files import atomic_writer, exclusive_folder, sync_folder
from megatron.core.config import ModelConfig
from megatron.core.interchange.element_types import Array
from megatron.core.interchange.folder_kind import INDEX_FILE, SINGLE_FILE, WEIGHT_FILES
from megatron.core.models.mixtral.hf_config import hf_config_with_dtype
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from tools.checkpoint.export_files import ModelFiles
from tools.checkpoint.hf_files import weight_files
from tools.checkpoint.model_folder import (
    CONFIG_FILE,
    Target,
    has_vocabulary,
    open_target,
)
from tools.checkpoint.stream import (
    CheckedSource,
    Destination,
    byte_size,
    check_disk,
    planned_bytes,
    print_plan,
    rows_at_a_time,
    transfer,
)
from tools.checkpoint.writers import SafetensorsFile, TensorPlan, plan_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where config and tokenizer come from, and how large a file may be."""
    parser.add_argument(
        "--huggingface-config-path",
        help="folder whose config.json and tokenizer files go with the weights (default: --load-dir); may be "
        "--save-dir, whose weights are then replaced; a config.json that is missing is made from the checkpoint",
    )
    parser.add_argument("--max-shard-size", type=byte_size, default="5GB", help="largest weight file (default: 5GB)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError if config, companion files or the target cannot be used."""
    Export(_config_folder(args), Path(args.save_dir), Path(args.load_dir))


def save(source: CheckedSource, args: argparse.Namespace) -> None:
    """Writes the source's weights to `args.save_dir`."""
    export = Export(_config_folder(args), Path(args.save_dir), Path(args.load_dir))
    export.write(source, args.max_shard_size)


def _config_folder(args: argparse.Namespace) -> Path | None:
    if args.huggingface_config_path is not None:
        return Path(args.huggingface_config_path)
    source = Path(args.load_dir)
    return source if os.path.lexists(source / CONFIG_FILE) else None


class Export:
    """A model folder to write: its config and companion files, and where, all checked before the source is opened.

    `target` must be absent, empty, or `config_folder` itself, whose weights are replaced. Without `config_folder` the
    checkpoint's own arguments and tokenizer are taken. Raises ValueError or OSError naming what cannot be read or
    written.
    """

    def __init__(self, config_folder: Path | None, target: Path, source: Path) -> None:
        self._files = ModelFiles(config_folder)
        self._target = open_target(target, [source], config_folder)

    @property
    def vocab_size(self) -> int | None:
        """Entries of the vocabulary that config.json says, if it is there."""
        size = (self._files.config or {}).get("vocab_size")
        return size if isinstance(size, int) else None

    def write(self, source: CheckedSource, max_shard_size: int) -> None:
        """Writes the folder. Raises ValueError if the config is of another model or the disk too small."""
        description, target = source.description, self._target
        config = self._files.config_for(description)
        avoid = target.folder if target.in_place else None
        writer = ShardsWriter(description.model, description.dtype, max_shard_size, avoid)
        files = {name: path for name, path in self._files.paths.items() if not target.in_place}
        made = {} if target.in_place else self._files.made
        sizes = {name: path.stat().st_size for name, path in files.items()}
        sizes |= {name: len(text) for name, text in made.items()}
        if not target.in_place and not has_vocabulary(files):
            where = self._files.folder or description.folder
            print(f"note: {where} has no tokenizer, nor will the new folder have one", file=sys.stderr)
        if source.dry_run:
            print_plan(source, writer, writer.rules)
            for name, size in sizes.items():
                origin = f"from {os.path.realpath(files[name])}" if name in files else "made for this tokenizer"
                print(f"{name}, {size:,} bytes\n    {origin}")
        check_disk(target, planned_bytes(writer, writer.rules) | sizes, report=source.dry_run)
        if source.dry_run:
            return
        with exclusive_folder(target.staging):
            _clear(target.staging)  # of an attempt that was killed
            try:
                writer.open(target.staging)
                transfer(source, writer, writer.rules)
                writer.check_complete()
                source.check_complete()
                writer.write_index(target.staging)
                for name, path in files.items():
                    _copy(path, target.staging / name)
                for name, text in made.items():
                    with atomic_writer(target.staging / name) as file:
                        file.write(text.encode())
                self._write_config(config, description.dtype)
                sync_folder(target.staging)
                _publish(target, writer.names)
            except BaseException:
                shutil.rmtree(target.staging, ignore_errors=True)
                raise
        print(f"wrote {target.name}: {len(writer.names)} weight file(s), {description.dtype}")

    def _write_config(self, config: dict[str, object], dtype: str) -> None:
        new, updated = self._target.staging / CONFIG_FILE, hf_config_with_dtype(config, dtype)
        if updated == self._files.config and self._files.folder is not None:
            old = self._files.folder / CONFIG_FILE
            if not old.read_bytes().startswith(codecs.BOM_UTF8):  # which transformers cannot read
                return _copy(old, new)
        with atomic_writer(new) as file:
            file.write((json.dumps(updated, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with open(source, "rb") as old, atomic_writer(target) as new:
        shutil.copyfileobj(old, new, 1 << 20)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _publish(target: Target, weights: list[str]) -> None:
    """Puts what is staged in its place, at once: the folder, or of a folder that was there config.json, moved last."""
    if target.in_place:
        return _replace_weights(target.staging, target.folder, weights)
    if target.staging.parent != target.folder:
        os.rename(target.staging, target.folder)
        return sync_folder(target.folder.parent)
    moved: list[Path] = []
    try:
        for name in sorted(os.listdir(target.staging), key=lambda name: name == CONFIG_FILE):
            if name == CONFIG_FILE:
                sync_folder(target.folder)
            moved.append(target.folder / name)
            os.rename(target.staging / name, moved[-1])
        target.staging.rmdir()
        sync_folder(target.folder)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _shard_names(count: int, avoid: Path | None) -> list[str]:
    """Names of the weight files; of several, all different from what is in the folder `avoid`."""
    if count == 1:
        return [SINGLE_FILE]
    for attempt in itertools.count(1):
        infix = "" if attempt == 1 else f"r{attempt}-"
        names = [f"model-{infix}{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if avoid is None or not any((avoid / name).exists() for name in names):
            return names
    raise AssertionError


class ShardsWriter:
    """The weight files of a model folder; new ones have names that no file in the folder `avoid` has."""

    def __init__(self, model: ModelConfig, dtype: str, max_shard_size: int, avoid: Path | None) -> None:
        self._dtype = dtype
        self.rules = list(mixtral_weights(model))
        self._plans = plan_shards(
            (TensorPlan(tensor.name, tensor.shape, dtype) for rule in self.rules for tensor in rule.sources),
            max_shard_size,
        )
        self.names = _shard_names(len(self._plans), avoid)
        self._shard_of = {
            tensor.name: name for name, plan in zip(self.names, self._plans, strict=True) for tensor in plan
        }
        self._files: dict[str, SafetensorsFile] = {}

    def open(self, folder: Path) -> None:
        """Makes the files, with nothing in them yet."""
        for name, plan in zip(self.names, self._plans, strict=True):
            self._files[name] = SafetensorsFile(folder / name, plan)

    def check_complete(self) -> None:
        """Raises ValueError naming a tensor of which not every row was written."""
        for file in self._files.values():
            file.check_complete()

    def write_index(self, folder: Path) -> None:
        """Writes the index of several files."""
        if len(self.names) > 1:
            total = sum(tensor.nbytes for plan in self._plans for tensor in plan)
            with atomic_writer(folder / INDEX_FILE) as file:
                index = {"metadata": {"total_size": total}, "weight_map": self._shard_of}
                file.write((json.dumps(index, indent=2) + "\n").encode("utf-8"))

    def chunks(self, rule: WeightRule) -> Iterator[range]:
        """The rows of a weight, cut as they are to be read."""
        return rule.chunks(1, rows_at_a_time(rule, self._dtype))

    def destinations(self, rule: WeightRule) -> list[Destination]:
        """All tensors that hold some of a weight."""
        found, start = [], 0
        for source in rule.sources:
            plan = TensorPlan(source.name, source.shape, self._dtype)
            part = ""
            if rule.groups > 1:
                part = f"its rows of each of {rule.groups} groups"
            elif len(rule.sources) > 1 or rule.padded_rows is not None:
                part = f"rows {start}:{start + source.shape[0]}"
            found.append(Destination(self._shard_of[source.name], source.name, plan.nbytes, part))
            start += source.shape[0]
        return found

    def write(self, rule: WeightRule, rows: range, array: Array) -> None:
        """Puts rows of a weight into the tensors it is made of."""
        for (source, part), view in zip(rule.source_rows(rows), rule.source_views(array, rows), strict=True):
            piece = view.reshape(len(part), *source.shape[1:])
            self._files[self._shard_of[source.name]].append(source.name, piece)


def _replace_weights(staging: Path, target: Path, names: list[str]) -> None:
    """Moves new weights into a model folder and removes the old ones; see the top of this file for the order."""
    try:
        old = {file.name for file in weight_files(target)[0] if file.parent == target}
    except FileNotFoundError:
        old = set()
    old |= {name for name in WEIGHT_FILES if (target / name).exists()}
    for name in names:
        os.replace(staging / name, target / name)
    if len(names) > 1:
        sync_folder(target)
        os.replace(staging / INDEX_FILE, target / INDEX_FILE)
        (target / SINGLE_FILE).unlink(missing_ok=True)
    sync_folder(target)
    os.replace(staging / CONFIG_FILE, target / CONFIG_FILE)
    keep = {*names, INDEX_FILE} if len(names) > 1 else set(names)
    for name in sorted(old - keep):
        (target / name).unlink(missing_ok=True)
    staging.rmdir()
    sync_folder(target)
