"""The spellings of weights in Megatron checkpoints: ours, and those of NVIDIA's fused and grouped modules.

TransformerEngine's linear layers hold the norm before them (`linear_qkv.layer_norm_weight`), its grouped experts one
weight each (`mlp.experts.linear_fc1.weight0`), and the older grouped experts all weights in two tensors, transposed:
`mlp.experts.weight1` is [hidden, experts x 2 ffn] in shape but [experts, hidden, 2 ffn] in memory, and
`mlp.experts.weight2` [experts x ffn, hidden] but [experts, ffn, hidden] (Megatron-Core's GroupedMLP).
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron.core.interchange.element_types import STORED_AS
from megatron.core.interchange.stored_tensor import LoadedTensor, StoredTensor

_LAYER = re.compile(r"decoder\.layers\.([0-9]+)\.(?:input_layernorm|self_attention|pre_mlp_layernorm|mlp)\.")
_FUSED_NORM = ".self_attention.linear_qkv.layer_norm_weight"
_GROUPED = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])\.weight([0-9]+)")
_STACKED = re.compile(r"(.*\.mlp\.experts)\.weight([12])")

Stored = StoredTensor | LoadedTensor


def count_layers(names: list[str]) -> int:
    """How many layers a stage has, from the names of its weights."""
    return max((int(match.group(1)) + 1 for match in map(_LAYER.match, names) if match), default=0)


def plain_names(path: Path, weights: dict[str, Stored], experts: int) -> dict[str, tuple[str, Stored]]:
    """Every weight under its name in our table, with its name in the file; `experts` is the number on a rank.

    TransformerEngine's `_extra_state` entries are left out by the caller. Raises ValueError naming a weight that is
    there in two spellings, or stacked experts of a shape that does not fit.
    """
    found: dict[str, tuple[str, Stored]] = {}
    for name, stored in weights.items():
        for plain, tensor in _spelled_out(path, name, stored, experts):
            if plain in found:
                raise ValueError(f"{path} has {plain} twice: as {found[plain][0]} and as {name}")
            found[plain] = (name, tensor)
    return found


def _spelled_out(path: Path, name: str, stored: Stored, experts: int) -> Iterator[tuple[str, Stored]]:
    if name.endswith(_FUSED_NORM):
        yield name.removesuffix(_FUSED_NORM) + ".input_layernorm.weight", stored
    elif match := _GROUPED.fullmatch(name):
        yield f"{match.group(1)}.local_experts.{match.group(3)}.{match.group(2)}.weight", stored
    elif match := _STACKED.fullmatch(name):
        for expert in range(experts):
            plain = f"{match.group(1)}.local_experts.{expert}.linear_fc{match.group(2)}.weight"
            yield plain, _expert_of_stack(path, name, stored, match.group(2) == "1", expert, experts)
    else:
        yield name, stored


def _expert_of_stack(path: Path, name: str, stored: Stored, gate_up: bool, expert: int, experts: int) -> Stored:
    width = stored.shape[1 if gate_up else 0] if len(stored.shape) == 2 else 1
    if len(stored.shape) != 2 or width % experts:
        raise ValueError(f"{path}: {name} of shape {list(stored.shape)} does not hold {experts} experts")
    rows, columns = (stored.shape[0], width // experts) if gate_up else (width // experts, stored.shape[1])
    if isinstance(stored, LoadedTensor):
        matrix = stored.read().reshape(experts, rows, columns)[expert].T
        return LoadedTensor(stored.file, stored.dtype, matrix)
    if stored.stride is not None:
        raise ValueError(f"{path}: {name} is not stored in one piece")
    offset = stored.offset + expert * rows * columns * STORED_AS[stored.dtype].itemsize
    return replace(stored, shape=(columns, rows), stride=(1, columns), offset=offset)
