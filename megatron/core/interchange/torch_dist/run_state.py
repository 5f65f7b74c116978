"""How far the run had come that saved a folder of Megatron-LM's `torch_dist` format."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from megatron.core.interchange.element_types import STORED_AS
from megatron.core.interchange.stored_tensor import StoredTensor, ZipRecords, stored_tensor
from megatron.core.interchange.torch_dist.arguments import Common, read_common
from megatron.core.interchange.torch_dist.tensors import CheckpointFolder
from megatron.core.interchange.torch_pickle import TensorEntry


@dataclass(frozen=True)
class RunState:
    """What is not a tensor of the model or of the optimizer; None where the folder does not say it."""

    arguments: SimpleNamespace
    """Every setting of the run that is a plain value."""
    iteration: int | None
    consumed_samples: int | None
    """Samples read."""
    scheduled_samples: int | None
    """Samples that updates were made from: the position in the schedule of the learning rate."""
    optimizer_steps: int | None
    """Updates that the moments are averages of."""
    loss_scale: dict[str, float] | None
    """A dynamic loss scale, under the names of `LossScaler.state`."""


def saved_run(checkpoint: CheckpointFolder) -> RunState:
    """Reads it. Raises ValueError if what should hold it is missing or damaged, or if optimizers differ in steps."""
    common = read_common(checkpoint)
    scheduler, optimizer = common.values.get("opt_param_scheduler"), common.values.get("optimizer")
    # Each group of parameters has the number, or all parameters together, or both optimizers of a chain.
    found = (_count(_number(value, common)) for value in _named(optimizer, ("step", "common_step")))
    steps = sorted({step for step in found if step is not None})
    if len(steps) > 1:
        raise ValueError(f"{common.path}: parts of the optimizer took {' and '.join(map(str, steps))} steps")
    return RunState(
        arguments=SimpleNamespace(
            **{name: _named_type(value) for name, value in vars(common.args).items() if _is_plain(value)}
        ),
        iteration=_count(common.values.get("iteration")),
        consumed_samples=_count(getattr(common.args, "consumed_train_samples", None)),
        scheduled_samples=_count(scheduler.get("num_steps")) if isinstance(scheduler, dict) else None,
        optimizer_steps=steps[0] if steps else None,
        loss_scale=_loss_scale(optimizer, common),
    )


def _is_plain(value: Any) -> bool:
    plain = bool | int | float | str | None
    return isinstance(value, plain) or (isinstance(value, list | tuple) and all(isinstance(v, plain) for v in value))


def _named_type(value: Any) -> Any:
    """The name that our settings have for a type of torch, any other value as it is."""
    is_type = isinstance(value, str) and value.removeprefix("torch.") in STORED_AS
    return value.removeprefix("torch.") if is_type else value


def _count(value: Any) -> int | None:
    """`value` as a number of things, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 62:
        return None
    return int(value) if value == int(value) else None


def _named(value: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """What is called one of `names` in nested dictionaries and lists."""
    seen, waiting = set(), [value]  # a pickle may hold the same list very often
    while waiting:
        outer = waiting.pop()
        if not isinstance(outer, dict | list | tuple) or id(outer) in seen:
            continue
        seen.add(id(outer))
        for name, entry in outer.items() if isinstance(outer, dict) else enumerate(outer):
            if name in names:
                yield entry
            else:
                waiting.append(entry)


def _number(value: Any, common: Common) -> float | None:
    """`value`, or the one number that a tensor holds."""
    if isinstance(value, TensorEntry):
        if value.shape not in ((), (1,)) or value.dtype not in ("float32", "float64"):
            return None
        found = stored_tensor(common.path, ZipRecords(common.path, common.window), "a number", value)
        assert isinstance(found, StoredTensor), value
        return float(replace(found, shape=(1,), stride=None).read()[0])
    return None if isinstance(value, bool) or not isinstance(value, int | float) else value


def _loss_scale(optimizer: Any, common: Common) -> dict[str, float] | None:
    scaler = next(_named(optimizer, ("grad_scaler",)), None)
    if not isinstance(scaler, dict):
        return None
    scale, good_steps = _number(scaler.get("scale"), common), _count(scaler.get("growth_tracker"))
    tolerated = _count(scaler.get("hysteresis_tracker"))
    if scale is None or not math.isfinite(scale) or scale <= 0 or good_steps is None or tolerated is None:
        return None
    return {"loss_scale": scale, "good_steps": good_steps, "tolerated_overflows": tolerated}
