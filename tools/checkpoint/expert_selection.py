"""Keeping some experts of every layer: a source that has fewer experts than the one it wraps."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.interchange.element_types import Array
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from megatron.core.text_files import read_text
from tools.checkpoint.stream import Description, Source, verify_source


def chosen_experts(text: str, statistics: Path | None, layers: int, experts: int) -> list[list[int]]:
    """The experts that each layer keeps, ascending, for a list such as `0,2,5,7`, or `best:4` and a routing statistic.

    The statistic is training's --metrics-path file (with --moe-per-layer-logging), whose steps are added up, or a JSON
    object with `tokens_per_expert`, one list of numbers for each layer. Raises ValueError naming what is wrong.
    """
    if match := re.fullmatch(r"best:([0-9]+)", text):
        if statistics is None:
            raise ValueError("--keep-experts best:N needs --routing-stats FILE, which training writes")
        count, load = int(match.group(1)), read_statistics(statistics, layers, experts)
        if not 1 <= count <= experts:
            raise ValueError(f"--keep-experts {text}: each layer has {experts} experts")
        return [sorted(sorted(range(experts), key=lambda e: (-counts[e], e))[:count]) for counts in load]
    if statistics is not None:
        raise ValueError("--routing-stats goes with --keep-experts best:N only")
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise ValueError(f"--keep-experts {text!r} is neither a list such as 0,2,5,7 nor best:4")
    kept = [int(part) for part in text.split(",")]
    if len(set(kept)) != len(kept) or max(kept) >= experts:
        raise ValueError(f"--keep-experts {text}: each layer has experts 0 to {experts - 1}, and each can be kept once")
    return [kept] * layers


def read_statistics(path: Path, layers: int, experts: int) -> list[list[float]]:
    """Tokens that each expert of each layer got. Raises ValueError naming the file if it is not of this model."""
    text = read_text(path)
    try:
        records = [json.loads(text)]
    except ValueError:
        records = [_record(path, line) for line in text.splitlines()]
    loads = [
        record["tokens_per_expert"] for record in records if isinstance(record, dict) and "tokens_per_expert" in record
    ]
    for load in loads:
        if (
            not isinstance(load, list)
            or len(load) != layers
            or not all(isinstance(counts, list) and len(counts) == experts for counts in load)
            or not all(isinstance(count, int | float) and count >= 0 for counts in load for count in counts)
        ):
            raise ValueError(
                f"{path}: tokens_per_expert must be {layers} lists (layers) of {experts} numbers (experts)"
            )
    if not loads:
        raise ValueError(f"{path} has no tokens_per_expert: train with --metrics-path and --moe-per-layer-logging")
    return [[sum(numbers) for numbers in zip(*counts, strict=True)] for counts in zip(*loads, strict=True)]


def _record(path: Path, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


class SelectedExperts:
    """A source of which each layer keeps the experts `kept[layer]`, and the router's rows of just these."""

    def __init__(self, source: Source, kept: list[list[int]]) -> None:
        self._source, self._kept = source, kept
        description = source.description
        count = len(kept[0])
        if count < description.model.moe_router_topk:
            raise ValueError(
                f"--keep-experts keeps {count} expert(s), but each token goes to {description.model.moe_router_topk}"
            )
        self._inner = {rule.name: rule for rule in mixtral_weights(description.model)}
        self._description = replace(
            description,
            model=replace(description.model, num_experts=count),
            config_changes={**description.config_changes, "num_local_experts": count},
        )

    @property
    def description(self) -> Description:
        """What is left of the checkpoint."""
        return self._description

    def verify(self) -> None:
        """The whole source's check."""
        verify_source(self._source)

    def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
        """Some rows of one Megatron weight, in the description's type."""
        inner = self._inner_rule(rule)
        if not rule.name.endswith(".router.weight"):
            return self._source.read(inner, rows, out)
        assert rule.layer is not None
        whole = self._source.read(inner, range(inner.shape[0]))
        return whole[self._kept[rule.layer]][rows.start : rows.stop]

    def origin(self, rule: WeightRule) -> list[str]:
        """Where a weight comes from."""
        found = self._source.origin(self._inner_rule(rule))
        if rule.name.endswith(".router.weight") and rule.layer is not None:
            return [f"{place}, rows {', '.join(map(str, self._kept[rule.layer]))}" for place in found]
        return found

    def _inner_rule(self, rule: WeightRule) -> WeightRule:
        """The source's weight that becomes `rule`; of a vocabulary, with the padding that is asked for."""
        if rule.layer is None:
            return rule
        if rule.expert is None:
            return self._inner[rule.name]
        return self._inner[
            rule.name.replace(f".{rule.expert}.linear", f".{self._kept[rule.layer][rule.expert]}.linear")
        ]
