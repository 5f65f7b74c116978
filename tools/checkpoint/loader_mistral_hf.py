"""Loader: a dense Mistral model folder, made into a Mixtral whose experts all begin as its MLP (arXiv:2212.05055).

The weights of the chosen experts sum to one, so the Mixtral computes what the dense model does, whatever its new router
says. Noise then lets the experts become different ones; it depends on (seed, weight, row) alone, never on the layout.
"""

import argparse
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from megatron.core.interchange.element_types import Array, cast, dtype_name, from_torch, to_torch
from megatron.core.interchange.stored_tensor import LoadedTensor, StoredTensor
from megatron.core.models.mixtral.hf_config import model_config_from_hf
from megatron.core.models.mixtral.hf_weights import HuggingFaceTensor, WeightRule
from tools.checkpoint.hf_files import HuggingFaceFolder
from tools.checkpoint.loader_mixtral_hf import HuggingFaceSource
from tools.checkpoint.stream import Source

_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_NOISE_ROWS = 64
"""Rows whose noise is drawn at once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the dense model does not have."""
    parser.add_argument("--num-experts", type=int, required=True, help="experts of each layer")
    parser.add_argument("--moe-router-topk", type=int, default=2, help="experts of each token (default: 2)")
    parser.add_argument(
        "--expert-noise",
        type=float,
        default=0.0,
        help="standard deviation of the normal noise added to every weight of every expert (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the router's weights and the noise (default: 1234)")
    parser.add_argument(
        "--no-check-logits",
        action="store_true",
        help="do not compute both models' logits, before noise, on some tokens first (one layer in memory at a time)",
    )


def open_source(args: argparse.Namespace) -> Source:
    """The model folder `args.load_dir`, with experts."""
    source = UpcycledSource(
        Path(args.load_dir), args.num_experts, args.moe_router_topk, args.expert_noise, args.seed, args.params_dtype
    )
    source.check_logits = not args.no_check_logits and not args.dry_run
    return source


class UpcycledSource(HuggingFaceSource):
    """A dense model folder seen as a Mixtral; every tensor of it has its place.

    `verify` compares logits if `check_logits` is set; `noise` is a standard deviation. Raises ValueError for another
    architecture or numbers that make no sense.
    """

    def __init__(
        self,
        folder: Path,
        num_experts: int,
        top_k: int = 2,
        noise: float = 0.0,
        seed: int = 1234,
        params_dtype: str | None = None,
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"--moe-router-topk must be between 1 and --num-experts {num_experts}, got {top_k}")
        if not 0 <= noise < float("inf"):
            raise ValueError(f"--expert-noise must be a standard deviation, got {noise}")
        self._options = (folder, num_experts, top_k, noise, seed, params_dtype)
        self._noise, self._seed = noise, seed
        self.check_logits = False
        opened = HuggingFaceFolder(folder)
        kind = opened.config.get("model_type")
        if kind != "mistral":
            raise ValueError(f"{folder}: config.json: model_type is {kind!r}, but a dense Mistral is needed")
        changes = {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": num_experts,
            "num_experts_per_tok": top_k,
        }
        opened.config = {**opened.config, **changes}
        self._deviation = model_config_from_hf(opened.config).init_method_std
        super().__init__(folder, params_dtype, opened)
        self._description = replace(self._description, config_changes=changes)

    def verify(self) -> None:
        """Raises ValueError if the logits before noise are not the dense model's."""
        if self.check_logits:
            from tools.checkpoint.upcycling_check import check_logits

            difference = check_logits(self.without_noise())
            print(f"logits before noise equal the dense model's: the largest difference is {difference:.1e}")

    def without_noise(self) -> "UpcycledSource":
        """The same model before noise."""
        folder, experts, top_k, _, seed, dtype = self._options
        return UpcycledSource(folder, experts, top_k, 0.0, seed, dtype)

    def _experts_there(self) -> int | None:
        return None

    def _name_and_shape(self, source: HuggingFaceTensor) -> tuple[str | None, tuple[int, ...]]:
        if source.name.endswith(".gate.weight"):
            return None, ()
        match = re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.\d+\.(w[123])\.weight", source.name)
        name = f"{match.group(1)}.mlp.{_PROJECTIONS[match.group(2)]}.weight" if match else source.name
        return name, source.shape

    def _located(self, source: HuggingFaceTensor) -> StoredTensor | LoadedTensor:
        name, _ = self._name_and_shape(source)
        assert name is not None
        return self._folder.tensors[name]

    def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
        """Some rows of one Megatron weight, in the description's type."""
        dtype = self._description.dtype
        if rule.name.endswith(".router.weight"):
            drawn = self._drawn(rule, 0, rule.shape[0])[rows.start : rows.stop]
            return cast(from_torch(drawn * self._deviation), "float32", dtype)
        array = super().read(rule, rows, out)
        if rule.expert is None or not self._noise:
            return array
        first = rows.start // _NOISE_ROWS
        blocks = [
            self._drawn(rule, number, min(_NOISE_ROWS, rule.shape[0] - number * _NOISE_ROWS))
            for number in range(first, -(-rows.stop // _NOISE_ROWS))
        ]
        skip = rows.start - first * _NOISE_ROWS
        noise = torch.cat(blocks)[skip : skip + len(rows)]
        noisy = to_torch(array, dtype).float() + noise * self._noise
        return cast(from_torch(noisy), dtype_name(noisy.dtype), dtype)

    def _drawn(self, rule: WeightRule, block: int, rows: int) -> torch.Tensor:
        """Normal numbers that depend on the seed and their place in the model only."""
        digest = hashlib.sha256(json.dumps([self._seed, rule.name, block]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(rows, *rule.shape[1:], generator=generator)

    def origin(self, rule: WeightRule) -> list[str]:
        """Where a weight comes from."""
        found = []
        for source in rule.sources:
            name, _ = self._name_and_shape(source)
            found.append("freshly initialized" if name is None else f"{self._folder.tensors[name].file.name}: {name}")
        return [*found, f"noise of deviation {self._noise}"] if rule.expert is not None and self._noise else found
