"""Saver: a Mixtral checkpoint in Megatron's format, one file a rank, at any parallel layout."""

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron.core.atomic_files import exclusive_folder
from megatron.core.config import ModelConfig, ParallelConfig
from megatron.core.interchange import (
    CHECKPOINT_FILE,
    CHECKPOINT_VERSION,
    Layout,
    begin_step,
    commit_step,
    model_args_namespace,
)
from megatron.core.interchange.element_types import STORED_AS, Array
from megatron.core.interchange.layout import abandon_step
from megatron.core.models.mixtral.weights import mixtral_table
from megatron.core.models.weight_table import WeightRule
from megatron.core.stages import Stage
from megatron.core.tokenizers import TOKENIZER_TYPES
from tools.checkpoint.model_folder import Target, open_target, usable_file
from tools.checkpoint.stream import (
    CheckedSource,
    Description,
    Destination,
    check_disk,
    planned_bytes,
    print_plan,
    rows_at_a_time,
    transfer,
)
from tools.checkpoint.torch_writer import TorchFile
from tools.checkpoint.writers import TensorPlan


def layer_counts(text: str) -> list[int]:
    """Numbers of layers, separated by commas (an argparse type)."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of layers such as 9,8,8,7")
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The layout to write, and the tokenizer to name in the checkpoint."""
    parser.add_argument("--target-tensor-parallel-size", type=int, default=1, help="tensor-parallel ranks to write for")
    parser.add_argument(
        "--target-pipeline-parallel-size",
        type=int,
        help="pipeline stages to write for (default: as --target-pipeline-layers says, or 1)",
    )
    parser.add_argument(
        "--target-pipeline-layers",
        type=layer_counts,
        metavar="N,N,...",
        help="layers of each pipeline rank, such as 9,8,8,7, if not equal; between the first and the last they must be",
    )
    parser.add_argument(
        "--target-decoder-first-pipeline-num-layers", type=int, help="layers of the first pipeline rank, if not equal"
    )
    parser.add_argument(
        "--target-decoder-last-pipeline-num-layers", type=int, help="layers of the last pipeline rank, if not equal"
    )
    parser.add_argument(
        "--target-num-virtual-stages-per-pipeline-rank",
        type=int,
        help="virtual stages of each pipeline rank, for the interleaved schedule",
    )
    parser.add_argument("--target-expert-parallel-size", type=int, default=1, help="expert-parallel ranks to write for")
    parser.add_argument(
        "--target-expert-tensor-parallel-size",
        type=int,
        help="ranks that split each expert's matrices (default: the tensor-parallel size)",
    )
    add_tokenizer_arguments(parser)


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """The padding of the vocabulary, and the tokenizer to name in the checkpoint."""
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        help="pad the vocabulary to a multiple of this times the tensor-parallel size (default: the source's, or 128)",
    )
    parser.add_argument(
        "--tokenizer-model", help="tokenizer folder or file to name in the checkpoint (default: the source's)"
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        help="kind of tokenizer (default: by the files: tokenizer.json, or else a sentencepiece tokenizer.model)",
    )


def find_tokenizer(model: str | None, kind: str | None) -> tuple[str | None, str | None]:
    """Type and place of a tokenizer from a folder or file; a folder with tokenizer.json is a Hugging Face tokenizer.

    With only a tokenizer.model it is read by sentencepiece, which is what the model was trained with. Raises
    FileNotFoundError if there is none.
    """
    if model is None or kind == "NullTokenizer":
        return kind, model
    path = Path(model).absolute()
    folder = path if path.is_dir() else path.parent
    if not path.exists() and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"no tokenizer {model}: give a folder with tokenizer.json, or a tokenizer.model file")
    for name in ("tokenizer.json", "tokenizer.model"):
        if path.is_dir() and os.path.lexists(path / name):
            usable_file(path, name)
    if path.is_file():
        usable_file(path.parent, path.name)
    if kind is not None and path.exists():
        return kind, str(path)
    if (folder / "tokenizer.json").is_file():
        return "PretrainedTokenizerFromHF", str(folder)
    if path.is_dir() and (path / "tokenizer.model").is_file():
        return "Llama2Tokenizer", str(path / "tokenizer.model")
    return ("Llama2Tokenizer" if path.suffix == ".model" else "PretrainedTokenizerFromHF"), str(path)


def target_layout(args: argparse.Namespace, model: ModelConfig) -> tuple[Layout, ParallelConfig]:
    """The layout that the command line asks for, and how it divides the layers.

    Raises ValueError if the model cannot be divided so.
    """
    counts, stages = args.target_pipeline_layers, args.target_pipeline_parallel_size
    first, last = args.target_decoder_first_pipeline_num_layers, args.target_decoder_last_pipeline_num_layers
    if counts is not None:
        if stages not in (None, len(counts)):
            raise ValueError(
                f"--target-pipeline-layers lists {len(counts)} ranks, --target-pipeline-parallel-size {stages}"
            )
        if first is not None or last is not None:
            raise ValueError("give --target-pipeline-layers, or the first and the last rank's layers, not both")
        if sum(counts) != model.num_layers:
            raise ValueError(
                f"--target-pipeline-layers: {sum(counts)} layers in all, but the model has {model.num_layers}"
            )
        if len(set(counts[1:-1])) > 1:
            raise ValueError(
                f"--target-pipeline-layers {','.join(map(str, counts))}: training divides the layers between the first "
                "and the last rank equally: make those in between equal"
            )
        stages = len(counts)
        if len(set(counts)) > 1:
            first, last = counts[0], counts[-1] if stages > 2 else None
    parallel = ParallelConfig(
        tensor_model_parallel_size=args.target_tensor_parallel_size,
        pipeline_model_parallel_size=1 if stages is None else stages,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
        num_virtual_stages_per_pipeline_rank=args.target_num_virtual_stages_per_pipeline_rank,
    )
    parallel.check_model(model, 1)
    expert, expert_tensor = args.target_expert_parallel_size, args.target_expert_tensor_parallel_size
    if expert < 1 or (expert_tensor is not None and expert_tensor < 1):
        raise ValueError("--target-expert-parallel-size and --target-expert-tensor-parallel-size must be positive")
    if model.num_experts % expert:
        raise ValueError(
            f"--num-experts ({model.num_experts}) is not divisible by --target-expert-parallel-size ({expert})"
        )
    layout = Layout(args.target_tensor_parallel_size, parallel.pipeline_model_parallel_size, expert, expert_tensor)
    return layout, parallel


def check(args: argparse.Namespace) -> Target:
    """Where to write. Raises ValueError if the folder is not empty, or not apart from the one that is read."""
    if args.tokenizer_model is not None:
        find_tokenizer(args.tokenizer_model, args.tokenizer_type)
    return open_target(Path(args.save_dir), [Path(args.load_dir)])


def save(source: CheckedSource, args: argparse.Namespace) -> None:
    """Writes the source's weights to `args.save_dir`/release; nothing is left of a failed attempt.

    Raises ValueError if the model does not divide over the layout, the folder is not empty or the disk too small.
    """
    description, target = source.description, check(args)
    model = model_to_write(description, args)
    try:
        layout, parallel = target_layout(args, model)
    except ValueError as error:
        message = re.sub("--(tensor|pipeline)-model|--(decoder|num-virtual)", r"--target-\1\2", str(error))
        raise ValueError(message) from None
    tokenizer = tokenizer_to_name(description, args)
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    extra = {
        **extra_args(description, tokenizer),
        "virtual_pipeline_model_parallel_size": chunks if chunks != 1 else None,
        "decoder_first_pipeline_num_layers": parallel.decoder_first_pipeline_num_layers,
        "decoder_last_pipeline_num_layers": parallel.decoder_last_pipeline_num_layers,
    }
    content = {
        "args": model_args_namespace(model, layout, description.seq_length, extra),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
    }
    writer = RankFilesWriter(model, layout, parallel.stages(model.num_layers), description.dtype)
    if source.dry_run:
        print_plan(source, writer, writer.rules)
    check_disk(target, planned_bytes(writer, writer.rules), report=source.dry_run)
    if source.dry_run:
        return
    with release_folder(target) as folder:
        writer.open(folder, content)
        transfer(source, writer, writer.rules)
        writer.check_complete()
        source.check_complete()
        commit_step(target.folder, "release", layout)
    print(f"wrote {target.name / 'release'}: {layout}, {description.dtype}, weights only")


@contextlib.contextmanager
def release_folder(target: Target) -> Iterator[Path]:
    """The hidden folder that the step `release` is written into; nothing is left of a failed attempt."""
    root, existed = target.folder, target.folder.exists()
    with exclusive_folder(begin_step(root, "release")):
        try:
            yield begin_step(root, "release")
        except BaseException:
            abandon_step(root, "release")
            if not existed:
                with contextlib.suppress(OSError):  # only if nothing else has come into it
                    root.rmdir()
            raise


def model_to_write(description: Description, args: argparse.Namespace) -> ModelConfig:
    """The source's model, its vocabulary padded as the command line says."""
    if args.make_vocab_size_divisible_by is None:
        return description.model
    return replace(description.model, make_vocab_size_divisible_by=args.make_vocab_size_divisible_by)


def tokenizer_to_name(description: Description, args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Type and place of the tokenizer: the command line's, or else the source's; says what else training must know."""
    if description.sliding_window is not None:
        print(
            f"note: the model attends to {description.sliding_window} tokens at most; train with a --seq-length that "
            "is not longer",
            file=sys.stderr,
        )
    if args.tokenizer_model is not None or args.tokenizer_type is not None or description.tokenizer_type is None:
        return find_tokenizer(args.tokenizer_model or description.tokenizer_model, args.tokenizer_type)
    return description.tokenizer_type, description.tokenizer_model


def extra_args(description: Description, tokenizer: tuple[str | None, str | None]) -> dict[str, object]:
    """Arguments to store beside those of the model's shape."""
    return {
        "tokenizer_type": tokenizer[0],
        "tokenizer_model": tokenizer[1],
        "vocab_file": description.vocab_file,
        "merge_file": description.merge_file,
        "sliding_window": description.sliding_window,
        "params_dtype": description.dtype,
        "fp16": description.dtype == "float16",
    }


@dataclass(frozen=True)
class _Place:
    """A weight's place in the files of all ranks."""

    key: str
    """`model`, or `model0` ... for virtual stages."""
    name: str
    size: int
    """Parts it is cut into."""
    files: dict[int, list[tuple[int, int, int]]]
    """The (tensor, pipeline, expert) ranks that hold each part."""


class RankFilesWriter:
    """The files of all ranks, written side by side so that every weight is read only once.

    `stages` are those of each pipeline rank, several of the interleaved schedule.
    """

    def __init__(self, model: ModelConfig, layout: Layout, stages: Sequence[Sequence[Stage]], dtype: str) -> None:
        self._layout, self._dtype = layout, dtype
        chunks = len(stages[0])
        self._keys = ["model"] if chunks == 1 else [f"model{chunk}" for chunk in range(chunks)]
        self._places: dict[str, _Place] = {}
        self._files: dict[tuple[int, int, int], TorchFile] = {}
        self.rules: list[WeightRule] = []
        per_rank = model.num_experts // layout.expert
        table = mixtral_table(model, model.padded_vocab_size(layout.tensor))
        for rank, own in enumerate(stages):
            for key, stage in zip(self._keys, own, strict=True):
                for expert_rank in range(layout.expert):
                    experts = range(expert_rank * per_rank, (expert_rank + 1) * per_rank)
                    for name, rule in table.named_weights(stage, experts):
                        if rule.expert is not None or expert_rank == 0:
                            self.rules.append(rule)
                            self._places[rule.name] = self._place(key, name, rule, rank, expert_rank)

    def _place(self, key: str, name: str, rule: WeightRule, rank: int, expert_rank: int) -> _Place:
        size = self._layout.tensor if rule.expert is None else self._layout.etp
        rule.part_shape(size)
        if rule.partition_dim is None:
            size = 1
        files: dict[int, list[tuple[int, int, int]]] = {part: [] for part in range(size)}
        for tp, pp, ep in self._layout.ranks():
            if pp == rank and (rule.expert is None or ep == expert_rank):
                files[tp % size].append((tp, pp, ep))
        return _Place(key, name, size, files)

    def open(self, folder: Path, content: dict[str, object]) -> None:
        """Makes the files, with nothing in them yet."""
        plans: dict[tuple[int, int, int], dict[str, list[TensorPlan]]] = {
            ranks: {key: [] for key in self._keys} for ranks in self._layout.ranks()
        }
        for rule in self.rules:
            place = self._places[rule.name]
            plan = TensorPlan(place.name, rule.part_shape(place.size), self._dtype)
            for holders in place.files.values():
                for ranks in holders:
                    plans[ranks][place.key].append(plan)
        for ranks, keys in plans.items():
            path = folder / self._layout.folder(*ranks) / CHECKPOINT_FILE
            path.parent.mkdir(exist_ok=True)
            self._files[ranks] = TorchFile(path, content, keys)

    def check_complete(self) -> None:
        """Raises ValueError naming a tensor of which not every row was written."""
        for file in self._files.values():
            file.check_complete()

    def chunks(self, rule: WeightRule) -> Iterator[range]:
        """The rows of a weight, cut as they are to be read."""
        return rule.chunks(self._places[rule.name].size, rows_at_a_time(rule, self._dtype))

    def destinations(self, rule: WeightRule) -> list[Destination]:
        """All tensors that hold some of a weight."""
        place = self._places[rule.name]
        nbytes = math.prod(rule.part_shape(place.size)) * STORED_AS[self._dtype].itemsize
        found = []
        for part, holders in place.files.items():
            words = ""
            if place.size > 1 and rule.partition_dim == 0:
                ranges = (f"{rows.start}:{rows.stop}" for rows in rule.part_rows(part, place.size))
                words = f"rows {' and '.join(ranges)}"
            elif place.size > 1:
                width = rule.shape[1] // place.size
                words = f"columns {part * width}:{(part + 1) * width}"
            for ranks in holders:
                file = f"release/{self._layout.folder(*ranks)}/{CHECKPOINT_FILE}"
                found.append(Destination(file, place.name, nbytes, words))
        return found

    def write(self, rule: WeightRule, rows: range, array: Array) -> None:
        """Puts rows of a weight into the files of the ranks that hold them."""
        place = self._places[rule.name]
        if place.size == 1:
            parts = {0: array}
        elif rule.partition_dim == 0:
            parts = {rule.owner(rows, place.size): array}
        else:
            parts = dict(enumerate(np.split(array, place.size, axis=1)))
        for part, piece in parts.items():
            for ranks in place.files[part]:
                self._files[ranks].append(f"{place.key}/{place.name}", piece)
