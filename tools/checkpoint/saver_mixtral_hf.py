"""Saver: a Mixtral model folder that transformers loads, with the config and tokenizer of the model it came from.

In a new folder: everything is written beside it and moved into place at the end. In the folder of the config itself:
new shards are written to a hidden folder in it, moved in under names that no old file has, and take effect with one
rename or removal (the index, or the single file that transformers prefers to it); until then the folder is the old
model, from then on the new one. config.json follows (only its type of the weights can differ, and transformers casts
to it), then stale weight files are removed. A kill leaves a loadable folder, at worst with files nothing refers to.
"""

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.core.atomic_files import atomic_writer, exclusive_folder, sync_folder
from megatron.core.config import ModelConfig
from megatron.core.interchange.element_types import Array
from megatron.core.models.mixtral.hf_config import check_config_matches, hf_config_with_dtype
from megatron.core.models.mixtral.hf_weights import WeightRule, mixtral_weights
from tools.checkpoint.hf_files import (
    INDEX_FILE,
    OLD_INDEX_FILE,
    OLD_SINGLE_FILE,
    SINGLE_FILE,
    companion_files,
    read_config,
    weight_files,
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
        help="folder whose config.json and tokenizer files go with the weights (default: --load-dir if it has them)",
    )
    parser.add_argument("--max-shard-size", type=byte_size, default="5GB", help="largest weight file (default: 5GB)")


def save(source: CheckedSource, args: argparse.Namespace) -> None:
    """Writes the source's weights to `args.save_dir`."""
    config_folder = Path(args.huggingface_config_path or source.description.folder)
    save_huggingface(source, config_folder, Path(args.save_dir), args.max_shard_size)


def save_huggingface(source: CheckedSource, config_folder: Path, target: Path, max_shard_size: int) -> None:
    """Writes a model folder; `target` must be absent, empty, or `config_folder` itself, whose weights are replaced.

    Raises ValueError if the config is of another model or the folder holds something else.
    """
    description = source.description
    config = {**read_config(config_folder), **description.config_changes}
    check_config_matches(description.model, config)
    in_place = target.exists() and target.samefile(config_folder)
    if not in_place and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not an empty folder: choose another one or remove what is in it")
    target = target.absolute()
    staging = target / ".saving" if in_place else target.with_name(f".{target.name}.saving")
    writer = ShardsWriter(description.model, description.dtype, max_shard_size, target if in_place else None)
    if source.dry_run:
        print_plan(source, writer, writer.rules)
    check_disk(target, planned_bytes(writer, writer.rules), report=source.dry_run)
    if source.dry_run:
        return
    with exclusive_folder(staging):
        for left_over in staging.iterdir():  # of an attempt that was killed
            left_over.unlink()
        try:
            writer.open(staging)
            transfer(source, writer, writer.rules)
            writer.check_complete()
            source.check_complete()
            writer.write_index(staging)
            names = writer.names
            if not in_place:
                for file in companion_files(config_folder):
                    _copy(file, staging / file.name)
            _write_config(config, config_folder, staging, description.dtype)
            sync_folder(staging)
            if in_place:
                _replace_weights(staging, target, names)
            else:
                os.rename(staging, target)
                sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    print(f"wrote {target}: {len(names)} weight file(s), {description.dtype}")


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as old, atomic_writer(target) as new:
        shutil.copyfileobj(old, new, 1 << 20)


def _write_config(config: dict[str, object], config_folder: Path, folder: Path, dtype: str) -> None:
    updated = hf_config_with_dtype(config, dtype)
    if updated == read_config(config_folder):
        return _copy(config_folder / "config.json", folder / "config.json")
    with atomic_writer(folder / "config.json") as file:
        file.write((json.dumps(updated, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


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
    old |= {name for name in (SINGLE_FILE, INDEX_FILE, OLD_SINGLE_FILE, OLD_INDEX_FILE) if (target / name).exists()}
    for name in names:
        os.replace(staging / name, target / name)
    if len(names) > 1:
        sync_folder(target)
        os.replace(staging / INDEX_FILE, target / INDEX_FILE)
        (target / SINGLE_FILE).unlink(missing_ok=True)
    sync_folder(target)
    os.replace(staging / "config.json", target / "config.json")
    keep = {*names, INDEX_FILE} if len(names) > 1 else set(names)
    for name in sorted(old - keep):
        (target / name).unlink(missing_ok=True)
    staging.rmdir()
    sync_folder(target)
