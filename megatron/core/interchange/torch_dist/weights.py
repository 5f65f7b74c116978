"""Which tensors of a checkpoint hold the weights of a model, and the optimizer's state of each."""

import re
from collections.abc import Iterable, Sequence

from megatron.core.interchange.element_types import STORED_AS
from megatron.core.interchange.torch_dist.names import Key, keys_of
from megatron.core.interchange.torch_dist.tensors import CheckpointFolder
from megatron.core.models.weight_table import WeightRule

WEIGHT = "weight"
STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
"""What an AdamW of Megatron-LM keeps of each weight."""
# The distributed optimizer calls its masters otherwise than the one without shards.
_SAVED_AS = {"param": "master", "fp32_param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_STATE = re.compile(rf"^(?:chained_[0-9]+\.)?optimizer\.state\.({'|'.join(_SAVED_AS)})\.(.+)$")
_BOUND_TO_LAYOUT = re.compile(r"^(?:chained_[0-9]+\.)?optimizer\.distributed\.")
_PREFIX = re.compile(r"^(?:(?:model|module)\.)+")
_HALVES = ("linear_fc1.weight_w", "linear_fc1.weight_v")
# Kept beside the weights; TransformerEngine's extra state is empty unless it trains in FP8.
_NO_WEIGHTS = re.compile(
    r"((chained_[0-9]+\.)?optimizer|rng_state|rerun_state_machine_state|common_state|opt_param_scheduler)\b.*|.*\._extra_state(/.*)?"
)


class ModelKeys:
    """The keys of a checkpoint by kind (weight, master, exp_avg, exp_avg_sq) and the name of what they hold."""

    def __init__(self, checkpoint: CheckpointFolder) -> None:
        self._checkpoint, self._folder = checkpoint, checkpoint.folder
        self._keys: dict[str, dict[str, str]] = {kind: {} for kind in (WEIGHT, *STATE_KINDS)}
        self._twice: set[str] = set()
        for key in checkpoint.catalog.tensors:
            state = _STATE.match(key)
            kind, name = (WEIGHT, key) if state is None else (_SAVED_AS[state[1]], state[2])
            name = _PREFIX.sub("", name)
            if name in self._keys[kind]:
                self._twice.add(kind)
            self._keys[kind][name] = key

    @property
    def has_state(self) -> bool:
        """Whether there is state of the optimizer that no layout is needed for."""
        return any(self._keys[kind] for kind in STATE_KINDS)

    @property
    def has_bound_state(self) -> bool:
        """Whether there is state of the optimizer in the buffers of the layout it was saved at."""
        catalog = self._checkpoint.catalog
        return any(map(_BOUND_TO_LAYOUT.match, (*catalog.tensors, *catalog.objects)))

    def key(self, name: str, kind: str = WEIGHT) -> str | None:
        """The key of the tensor that holds `name`, a weight that no layer has."""
        return self._keys[kind].get(name)

    def tensors(self, kind: str = WEIGHT) -> int:
        """How many there are of a kind, each layer's and expert's counted."""
        return sum(max(len(self._checkpoint.catalog.tensors[key].chunks), 1) for key in self._keys[kind].values())

    def place(self, rule: WeightRule, kind: str = WEIGHT) -> Key:
        """Where a weight is, or what the optimizer keeps of it. Raises ValueError naming the key that is missing."""
        keys = keys_of(rule)
        for key in keys:
            if key.name in self._keys[kind]:
                return Key(self._keys[kind][key.name], key.at)
        what = "" if kind == WEIGHT else f"the optimizer's {kind} of "
        raise ValueError(f"{self._folder} lacks {what}{' or '.join(dict.fromkeys(key.name for key in keys))}")

    def check(self, rules: Sequence[WeightRule], layers: int, experts: int, kinds: Iterable[str] = (WEIGHT,)) -> None:
        """Raises ValueError, naming a key, unless what is there of each kind is of just these weights and readable."""
        for kind in kinds:
            if kind in self._twice:
                what = "weights" if kind == WEIGHT else f"optimizer's {kind}"
                raise ValueError(f"{self._folder} holds the {what} of several models")
            possible = {key.name for rule in rules for key in keys_of(rule)}
            self._check_unknown(kind, [key for name, key in self._keys[kind].items() if name in possible])
            places = [self.place(rule, kind) for rule in rules]
            self._check_unknown(kind, {key for key, _ in places})
            for rule, place in zip(rules, places, strict=True):
                self._check_tensor(rule, place, layers, experts)

    def _check_unknown(self, kind: str, known: Iterable[str]) -> None:
        """Raises ValueError naming the keys of a kind that are not `known`."""
        unknown = sorted(
            {key for name, key in self._keys[kind].items() if not _NO_WEIGHTS.fullmatch(name)}.difference(known)
        )
        apart = [key for key in unknown if key.endswith(_HALVES)]
        if apart:
            raise ValueError(
                f"{self._folder} holds gate and up apart ({apart[0]}), as Megatron-FSDP and singleton_local_shards do: "
                "save it again with --ckpt-format torch_dist, without Megatron-FSDP"
            )
        if unknown:
            more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
            raise ValueError(
                f"{self._folder} has tensors that a Mixtral model does not: {', '.join(unknown[:4])}{more}"
            )

    def _check_tensor(self, rule: WeightRule, place: Key, layers: int, experts: int) -> None:
        key, at = place
        axes = (layers, experts)[-len(at) :] if at and rule.expert is not None else (layers,) * len(at)
        shape, dtype = self._checkpoint.shape(key), self._checkpoint.dtype(key)
        if shape != (*axes, *rule.shape):
            raise ValueError(f"{self._folder}: {key} is of shape {list(shape)}, expected {[*axes, *rule.shape]}")
        if dtype not in STORED_AS:
            raise ValueError(f"{self._folder}: {key} is of type {dtype}: only {', '.join(STORED_AS)} are supported")
