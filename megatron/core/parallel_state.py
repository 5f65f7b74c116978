"""Process groups of every kind of parallelism, as slices of two rank grids.

The dense grid is (pp, dp, cp, tp) and the expert grid (pp, edp, ep, etp), both over the same ranks with the last axis
varying fastest, so that tensor-parallel ranks are neighbours. Groups are arguments everywhere else, never looked up.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.core.config import ParallelConfig

# torch 2.13 renamed these two and warns about the old names; torch 2.11 has only those.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Group:
    """Some ranks of the job, and this process's place among them.

    At size one there is no communication and no `handle`: the same code then runs without torch.distributed.
    """

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    handle: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """Whether this process is the group's first rank."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this process is the group's last rank."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class PipelineChannels:
    """Groups of two for messages between this rank and the neighbouring stages' ranks; of one where there are none."""

    forward_in: Group = Group()
    """Hidden states from the stage before."""
    forward_out: Group = Group()
    """Hidden states to the next stage."""
    backward_in: Group = Group()
    """Gradients from the next stage."""
    backward_out: Group = Group()
    """Gradients to the stage before."""


@dataclass(frozen=True)
class ProcessGroups:
    """All groups this process belongs to; the defaults are those of a single process."""

    world: Group = Group()
    control: Group = Group()
    """The same ranks on a gloo communicator with a long timeout, for waiting while one rank works or saves."""
    tp: Group = Group()
    """Tensor parallel: ranks that split each weight matrix."""
    pp: Group = Group()
    """Pipeline parallel: ranks that hold the stages of one model replica."""
    pp_channels: PipelineChannels = PipelineChannels()
    """Connections between neighbouring stages of this rank's pipeline."""
    dp: Group = Group()
    """Data parallel: ranks that hold the same dense parameters and read different samples."""
    cp: Group = Group()
    """Context parallel: ranks that split a sequence."""
    tp_cp: Group = Group()
    """Ranks that hold the tokens of one microbatch between them, with sequence parallelism."""
    dp_cp: Group = Group()
    """Ranks whose dense gradients are averaged."""
    model: Group = Group()
    """One model replica of the dense parameters: tp x pp."""
    ep: Group = Group()
    """Expert parallel: ranks that share out the experts of a layer."""
    etp: Group = Group()
    """Expert tensor parallel: ranks that split each expert's matrices."""
    ep_etp: Group = Group()
    """Ranks that between them hold all experts of a layer, once."""
    edp: Group = Group()
    """Ranks that hold the same expert parameters, whose gradients are averaged."""
    expert_model: Group = Group()
    """One replica of all experts: etp x ep x pp."""


CONTROL_TIMEOUT = timedelta(hours=6)
DENSE_AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "etp")

# Group name -> (grid, axes the group runs along); the remaining axes number its copies.
_GROUP_AXES = {
    "tp": (DENSE_AXES, ("tp",)),
    "pp": (DENSE_AXES, ("pp",)),
    "dp": (DENSE_AXES, ("dp",)),
    "cp": (DENSE_AXES, ("cp",)),
    "tp_cp": (DENSE_AXES, ("cp", "tp")),
    "dp_cp": (DENSE_AXES, ("dp", "cp")),
    "model": (DENSE_AXES, ("pp", "tp")),
    "ep": (EXPERT_AXES, ("ep",)),
    "etp": (EXPERT_AXES, ("etp",)),
    "ep_etp": (EXPERT_AXES, ("ep", "etp")),
    "edp": (EXPERT_AXES, ("edp",)),
    "expert_model": (EXPERT_AXES, ("pp", "ep", "etp")),
}

# Groups whose communication overlaps with that of the others.
_REPLICAS = {"dp", "dp_cp", "edp"}


def grid_sizes(config: ParallelConfig, world_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the axes of the dense and of the expert grid. Raises ValueError if the layout does not fit the world."""
    dense = {
        "pp": config.pipeline_model_parallel_size,
        "dp": config.data_parallel_size(world_size),
        "cp": config.context_parallel_size,
        "tp": config.tensor_model_parallel_size,
    }
    expert_model = (
        config.pipeline_model_parallel_size * config.expert_model_parallel_size * config.expert_tensor_parallel
    )
    if world_size % expert_model:
        raise ValueError(
            f"world size {world_size} is not divisible by pipeline ({config.pipeline_model_parallel_size}) x expert "
            f"({config.expert_model_parallel_size}) x expert-tensor ({config.expert_tensor_parallel}) parallel size "
            f"= {expert_model}: start a multiple of {expert_model} processes or change the layout"
        )
    expert = {
        "pp": config.pipeline_model_parallel_size,
        "edp": world_size // expert_model,
        "ep": config.expert_model_parallel_size,
        "etp": config.expert_tensor_parallel,
    }
    return dense, expert


def rank_lists(sizes: dict[str, int], axes: tuple[str, ...]) -> list[list[int]]:
    """The ranks of every group that runs along `axes` of a grid, in rank order within each group."""
    names = tuple(sizes)
    grid = torch.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    others = [names.index(name) for name in names if name not in axes]
    along = [names.index(name) for name in names if name in axes]
    return grid.permute(*others, *along).reshape(-1, math.prod(sizes[name] for name in axes)).tolist()


def build_process_groups(
    config: ParallelConfig,
    rank: int,
    world_size: int,
    timeout: timedelta | None = None,
    control_backend: str = "gloo",
) -> ProcessGroups:
    """Creates this process's groups; collective over all ranks of an initialised torch.distributed.

    Raises ValueError if the layout does not divide `world_size`.
    """
    dense, expert = grid_sizes(config, world_size)
    sizes = {DENSE_AXES: dense, EXPERT_AXES: expert}
    # Groups with the same members share one communicator, since each costs memory on a GPU. But gradients are reduced
    # during the backward pass, at another moment on each rank, which must not mix with the model's own communication.
    handles: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def make(ranks: list[int], replicas: bool = False) -> dist.ProcessGroup | None:
        key = (replicas, *ranks)
        if len(ranks) == 1:
            return None
        if key not in handles:
            handles[key] = dist.new_group(ranks, timeout=timeout)
        return handles[key]

    groups = {
        name: _own_group(rank_lists(sizes[grid], axes), rank, functools.partial(make, replicas=name in _REPLICAS))
        for name, (grid, axes) in _GROUP_AXES.items()
    }
    world = _own_group([list(range(world_size))], rank, make)
    handle = dist.new_group(backend=control_backend, timeout=CONTROL_TIMEOUT) if world_size > 1 else None
    channels = _pipeline_channels(rank_lists(dense, ("pp",)), rank, config.interleaved, timeout)
    return ProcessGroups(world=world, control=Group(world.ranks, rank, handle), pp_channels=channels, **groups)


def _pipeline_channels(
    pipelines: list[list[int]], rank: int, interleaved: bool, timeout: timedelta | None
) -> PipelineChannels:
    """The connections of this rank; in an interleaved pipeline the last rank is also followed by the first.

    Channels with the same members do not share a communicator: see `pipeline_parallel.p2p_communication`.
    """
    own: dict[str, Group] = {}
    for ranks in pipelines:
        followers = ranks[1:] + ranks[:1] if interleaved else ranks[1:]
        for sender, receiver in zip(ranks, followers, strict=False):
            if sender == receiver:  # a pipeline of one rank
                continue
            pair = sorted((sender, receiver))
            for kind, first in (("forward", sender), ("backward", receiver)):
                handle = dist.new_group(pair, timeout=timeout)
                if rank in pair:
                    name = f"{kind}_{'out' if rank == first else 'in'}"
                    own[name] = Group(tuple(pair), pair.index(rank), handle)
    return PipelineChannels(**own)


def _own_group(lists: list[list[int]], rank: int, make: Callable[[list[int]], dist.ProcessGroup | None]) -> Group:
    own = Group()
    for ranks in lists:  # every rank takes part in the creation of every group
        handle = make(ranks)
        if rank in ranks:
            own = Group(tuple(ranks), ranks.index(rank), handle)
    return own
