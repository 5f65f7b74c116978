"""Loader: a Mixtral checkpoint in Megatron's format, converted or trained, of any tensor and pipeline layout."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.core.interchange import (
    CHECKPOINT_FILE,
    Step,
    available_layout,
    find_checkpoint,
    load_torch,
    model_config_from_args,
    rank_dir_name,
)
from megatron.core.models.mixtral.hf_weights import WeightRule, stage_weights
from megatron.core.tensor_parallel.partition import join_from_tp
from tools.checkpoint.stream import Description, Source, common_dtype, config_dtype, list_some


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
    return MegatronSource(
        Path(args.load_dir),
        iteration=args.iteration,
        true_vocab_size=args.true_vocab_size,
        params_dtype=args.params_dtype,
    )


class MegatronSource:
    """A step's folder whose files hold the parts of every weight, and nothing else.

    `layout` is the (tensor, pipeline) size the caller believes it has; `fallback_vocab_size` counts only if the
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
        layout: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.folder, self.iteration = find_checkpoint(path, iteration)
        stored = available_layout(self.folder)
        self._tp, self._pp = stored.tensor, stored.pipeline
        if stored.expert > 1:
            raise ValueError(f"{self.folder} was saved with expert parallelism, which is not supported yet")
        wanted = tuple(there if given is None else given for given, there in zip(layout, (self._tp, self._pp)))
        if wanted != (self._tp, self._pp):
            raise ValueError(
                f"{self.folder} was saved with tensor-parallel size {self._tp} and pipeline-parallel size {self._pp}, "
                f"not {wanted[0]} and {wanted[1]}"
            )
        self._weights: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        args = argparse.Namespace()
        for stage in range(self._pp):
            for rank in range(self._tp):
                content = self._load(rank, stage)
                self._weights[rank, stage] = content["model"]
                if (rank, stage) == (0, 0):
                    args = content["args"]
        self._check_layout(args)
        self._padded = self._weights[0, 0].get("embedding.word_embeddings.weight", torch.empty(0)).shape[0] * self._tp
        model = model_config_from_args(args, true_vocab_size)
        if model.vocab_size is None and fallback_vocab_size is not None:
            model = replace(model, vocab_size=fallback_vocab_size)
        if model.vocab_size is None:
            print(
                f"warning: the checkpoint only knows its padded vocabulary size: all {self._padded} entries are taken "
                "as real; give the true size with --true-vocab-size",
                file=sys.stderr,
            )
            model = replace(model, vocab_size=self._padded)
        assert model.vocab_size is not None
        if model.vocab_size > self._padded > 0:
            raise ValueError(f"the vocabulary has {model.vocab_size} entries but the embedding {self._padded} rows")
        self._layers_per_stage = model.num_layers // self._pp
        dtype = common_dtype(self._check_weights(model), params_dtype)
        self._description = Description(
            model=replace(model, params_dtype=config_dtype(dtype)),
            dtype=dtype,
            folder=self.folder,
            seq_length=getattr(args, "seq_length", None) or model.max_position_embeddings,
            sliding_window=getattr(args, "sliding_window", None),
            tokenizer_type=getattr(args, "tokenizer_type", None),
            tokenizer_model=getattr(args, "tokenizer_model", None),
        )

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""
        return self._description

    def _file(self, rank: int, stage: int) -> Path:
        return self.folder / rank_dir_name(rank, stage, self._pp) / CHECKPOINT_FILE

    def _load(self, rank: int, stage: int) -> dict[str, Any]:
        path = self._file(rank, stage)
        content = load_torch(path, mmap=True)
        if not isinstance(content.get("args"), argparse.Namespace) or not isinstance(content.get("model"), dict):
            raise ValueError(f"{path} has no 'args' and 'model': it is not a checkpoint of one model part")
        return content

    def _check_layout(self, args: argparse.Namespace) -> None:
        stored = (
            getattr(args, "tensor_model_parallel_size", self._tp),
            getattr(args, "pipeline_model_parallel_size", self._pp),
        )
        if stored != (self._tp, self._pp) or getattr(args, "expert_model_parallel_size", 1) != 1:
            raise ValueError(
                f"{self.folder} has folders for tensor x pipeline = {self._tp} x {self._pp}, but was saved with "
                f"{stored[0]} x {stored[1]} and expert-parallel size {getattr(args, 'expert_model_parallel_size', 1)}"
            )

    def _check_weights(self, model: Any) -> dict[str, torch.dtype]:
        """Types of all tensors, after every name and shape of every file has been accounted for."""
        dtypes: dict[str, torch.dtype] = {}
        for (rank, stage), weights in self._weights.items():
            path = self._file(rank, stage)
            rules = dict(stage_weights(model, stage, self._pp, self._padded))
            if not all(isinstance(name, str) for name in weights):
                raise ValueError(f"{path}: the names of its tensors are not text")
            stored = {name for name in weights if not name.endswith("_extra_state")}
            missing, unknown = sorted(set(rules) - stored), sorted(stored - set(rules))
            if missing:
                raise ValueError(f"{path} lacks {list_some(missing)}")
            if unknown:
                raise ValueError(f"{path} has tensors that a Mixtral model does not: {list_some(unknown)}")
            for name, rule in rules.items():
                shape = list(rule.shape)
                if rule.partition_dim is not None:
                    shape[rule.partition_dim] //= self._tp
                if not isinstance(weights[name], torch.Tensor):
                    raise ValueError(f"{path}: {name} is not a tensor")
                if list(weights[name].shape) != shape:
                    raise ValueError(f"{path}: {name} is of shape {list(weights[name].shape)}, expected {shape}")
                dtypes[f"{name} in {path}"] = weights[name].dtype
        return dtypes

    def read(self, rule: WeightRule, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Part `rank` of `size` of one Megatron weight, in the description's type."""
        stage, name = self._place(rule)
        parts = [self._weights[part, stage][name] for part in range(self._tp)]
        if size == self._tp and rule.partition_dim is not None and rule.padded_rows in (None, self._padded):
            tensor = parts[rank]
        else:
            try:
                whole = join_from_tp(parts, rule.partition_dim, rule.partition_stride)
            except ValueError as error:
                raise ValueError(f"{self.folder}: {rule.name}: {error}") from error
            tensor = rule.slice_padded(whole, rank, size)
        tensor = tensor.to(self._description.dtype)
        return tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    def _place(self, rule: WeightRule) -> tuple[int, str]:
        """The stage that holds a weight, and its name there."""
        if rule.layer is None:
            return (0 if rule.name.startswith("embedding.") else self._pp - 1), rule.name
        stage, layer = divmod(rule.layer, self._layers_per_stage)
        return stage, rule.name.replace(f"decoder.layers.{rule.layer}.", f"decoder.layers.{layer}.", 1)
