"""Changes of flags with which a job needs less memory: which there are, what each costs, and the cheapest that fits.

An axis is one thing to change, in levels; a set of changes has a level of each axis. Sets are tried from the cheapest
on: no change of a dearer axis is made before all of the cheaper ones have been tried together.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron.training.config import Arguments
from megatron.training.dry_run import DryRun, StateMemory


class Change(NamedTuple):
    """Fields of any section, by name, and what setting them costs."""

    fields: dict[str, Any]
    cost: str


AS_GIVEN = Change({}, "")
_SELECTIVE = {"recompute_granularity": "selective"}
_FULL = {
    "recompute_granularity": "full",
    "recompute_modules": (),
    "recompute_activations": False,
    "moe_layer_recompute": False,
}
# float16 has the bits for second moments that decay by 0.999, bfloat16 has not
_SHORT_MOMENTS = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp16"}

FREE = (
    Change({"use_distributed_optimizer": True}, ""),
    Change({"use_precision_aware_optimizer": True, "main_params_dtype": "bf16-remainder"}, ""),
)
"""What changes neither numbers nor time: taken wherever it saves something."""
CHANGES = (
    (Change(_SHORT_MOMENTS, "moments rounded to 16 bits"),),
    (Change({"micro_batch_size": 1}, "smaller products"),),
    (
        Change(_SELECTIVE, "attention computed twice"),
        Change(_SELECTIVE | {"recompute_modules": ("core_attn", "moe")}, "attention and experts computed twice"),
        Change(_FULL, "every layer computed twice, up to a third more time"),
    ),
    (Change({"grad_reduce_in_bf16": True}, "sums of gradients rounded to bfloat16"),),
)
"""Axes of changes, the cheapest first, each with its levels. What the program has no flag for is left out."""
OFFLOADS = tuple(
    Change({"optimizer_cpu_offload": True, "optimizer_offload_fraction": share}, f"the host updates {share:.0%}")
    for share in (0.25, 0.5, 0.75, 1.0)
)
"""The dearest axis, dearer than another layout."""
_OF_STATE = ("use_distributed_optimizer",)
"""Fields of the layout on which no temporary tensor depends."""
_MOST_TENSOR_RANKS = 8
"""Those of a machine, beyond which messages between layers are slow."""


@dataclass(frozen=True)
class Suggestion:
    """What was tried, and what it takes."""

    flags: str
    """The changes as they are typed; empty for none."""
    cost: str
    """What they cost, in words."""
    needed: int
    """Bytes, on the rank that needs most if they fit."""
    at_least: bool = False
    """Whether these are the bytes of the state alone, which are too many already."""


@dataclass(frozen=True)
class Tools:
    """What is run to know the memory of a job."""

    state: Callable[[Arguments], StateMemory]
    """Of the rank that --dry-run names, without a step."""
    run: Callable[[Arguments], DryRun]
    """Of that rank."""
    worst: Callable[[Arguments], int]
    """Bytes on the rank that needs most."""


def flags_of(arguments: Arguments, changes: Sequence[Change]) -> str:
    """What the changes add to the command line of a job."""
    given: dict[str, Any] = {}
    for section in dataclasses.fields(arguments):
        given |= vars(getattr(arguments, section.name))
    merged: dict[str, Any] = {}
    for change in changes:
        merged |= change.fields
    return " ".join(_flag(name, value) for name, value in merged.items() if given[name] != value)


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return flag
    if value is False or value == ():
        return f"(without {flag})"
    return f"{flag} {' '.join(value) if isinstance(value, tuple) else value}"


def changed(arguments: Arguments, changes: Sequence[Change]) -> Arguments:
    """The job with these changes. Raises ValueError if they do not fit it, AttributeError for unknown fields."""
    for change in changes:
        rest = dict(change.fields)
        for section in dataclasses.fields(arguments):
            config = getattr(arguments, section.name)
            mine = {field.name: rest.pop(field.name) for field in dataclasses.fields(config) if field.name in rest}
            arguments = replace(arguments, **{section.name: replace(config, **mine)}) if mine else arguments
        if rest:
            raise AttributeError(f"no setting is called {min(rest)}")
    arguments.parallel.check_model(arguments.model, arguments.data.seq_length)
    return arguments


def _levels(arguments: Arguments, changes: Sequence[Change]) -> list[Change]:
    """No change, and those of `changes` that the job can have; what it has stands for those before that."""
    levels = [AS_GIVEN]
    for change in changes:
        try:
            new = changed(arguments, [change])
        except (ValueError, AttributeError):
            continue
        levels = [AS_GIVEN] if new == arguments else [*levels, change]
    return levels


def layouts(arguments: Arguments, world_size: int) -> list[Change]:
    """Layouts of the same ranks that divide the model more: by experts, by tensors within a machine, by layers."""
    parallel, experts = arguments.parallel, arguments.model.num_experts
    ep, tp, pp = (
        parallel.expert_model_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    found: list[Change] = []
    # the fewest more parts of the model first, and of as many parts experts before tensors before layers
    factors = itertools.product((1, 2, 4, 8), repeat=3)
    for more_pp, more_tp, more_ep in sorted(factors, key=lambda more: (more[0] * more[1] * more[2], more)):
        sizes = {
            "expert_model_parallel_size": ep * more_ep,
            "tensor_model_parallel_size": tp * more_tp,
            "pipeline_model_parallel_size": pp * more_pp,
        }
        new = {name: size for name, size in sizes.items() if size != getattr(parallel, name)}
        if not new or ep * more_ep > experts or tp * more_tp > max(tp, _MOST_TENSOR_RANKS):
            continue
        if tp * more_tp > 1 and not parallel.sequence_parallel:
            new["sequence_parallel"] = True
        change = Change(new, f"more messages: {_messages(more_ep, more_tp, more_pp)}")
        if _runs(arguments, change, world_size):
            found.append(change)
    return found


def _messages(ep: int, tp: int, pp: int) -> str:
    kinds = (
        (ep, "rows to experts on other ranks"),
        (tp, "sums in every layer"),
        (pp, "stages that wait for each other"),
    )
    return ", ".join(text for more, text in kinds if more > 1)


def _runs(arguments: Arguments, change: Change, world_size: int) -> bool:
    """Whether the ranks and the batch can be divided so."""
    try:
        new = changed(arguments, [change])
        new.parallel.stages(new.model.num_layers)
        replicas = new.parallel.data_parallel_size(world_size)
        new.training.batches(replicas)
    except ValueError:
        return False
    parallel = new.parallel
    per_expert = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel
    return (world_size // parallel.pipeline_model_parallel_size) % per_expert == 0


class _Estimates:
    """The memory of sets of changes, from the state and the step that many of them have in common."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self._states: dict[object, StateMemory] = {}
        self._runs: dict[object, DryRun] = {}

    def state(self, job: Arguments) -> StateMemory:
        """Of the rank that --dry-run names."""
        key = job.parallel, job.optimizer
        if key not in self._states:
            self._states[key] = self.tools.state(job)
        return self._states[key]

    def needed(self, job: Arguments) -> int:
        """Bytes of that rank."""
        layout = tuple(value for name, value in vars(job.parallel).items() if name not in _OF_STATE)
        key = layout, job.recompute, job.training
        if key not in self._runs:
            self._runs[key] = self.tools.run(job)
        run, state = self._runs[key], self.state(job)
        return max(state.peak, state.live + run.activations) + run.libraries.total

    def fits(self, job: Arguments, size: float) -> bool:
        """Whether that rank does; without a step if its state does not already."""
        return self.state(job).live <= size and self.needed(job) <= size


def suggestions(arguments: Arguments, world_size: int, size: float, tools: Tools) -> Iterator[Suggestion]:
    """Sets of changes from the cheapest on, each with less memory than those before it; the last fits `size` if any do.

    Other layouts, and shares on the host, are looked into only if they fit together with all other changes.
    """
    estimates = _Estimates(tools)
    least = dict.fromkeys((False, True), float("inf"))
    for changes in _sets(arguments, world_size, size, estimates):
        job = _with(arguments, changes)
        if job is None:
            continue
        need = estimates.state(job).live
        at_least = need > size
        if not at_least:
            need = estimates.needed(job)
            if need <= size:  # then every rank is looked at
                need = tools.worst(job)
        if need < least[at_least]:
            least[at_least] = need
            cost = ", ".join(change.cost for change in changes if change.cost)
            yield Suggestion(flags_of(arguments, changes), cost, need, at_least)
        if need <= size:
            return


def _sets(arguments: Arguments, world_size: int, size: float, estimates: _Estimates) -> Iterator[list[Change]]:
    """All sets of changes, the cheapest first."""
    free: list[Change] = []
    yield free
    for change in FREE:
        if len(_levels(arguments, (change,))) > 1:
            more = [*free, change]
            if estimates.state(changed(arguments, more)).live < estimates.state(changed(arguments, free)).live:
                free = more
                yield free
    axes = [_levels(arguments, axis) for axis in CHANGES]
    for offload, layout in itertools.product(_levels(arguments, OFFLOADS), (AS_GIVEN, *layouts(arguments, world_size))):
        dearest = _with(arguments, [*free, *(levels[-1] for levels in axes), layout, offload])
        if (offload, layout) == (AS_GIVEN, AS_GIVEN) or (dearest is not None and estimates.fits(dearest, size)):
            for chosen in itertools.product(*reversed(axes)):
                yield [*free, *reversed(chosen), layout, offload]


def _with(arguments: Arguments, changes: Sequence[Change]) -> Arguments | None:
    """None if the changes do not go together."""
    try:
        return changed(arguments, changes)
    except ValueError:
        return None
