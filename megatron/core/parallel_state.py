"""Process groups of every kind of parallelism, as slices of two rank grids.

The dense grid is (pp, dp, cp, tp) and the expert grid (pp, edp, ep, etp), both over the same ranks with the last axis
varying fastest, so that tensor-parallel ranks are neighbours. Groups are arguments everywhere else, never looked up.
"""

import math
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import collectives
from megatron.core.config import ParallelConfig


@dataclass(frozen=True)
class Ranks:
    """Some ranks of the job, and this process's place among them."""

    ranks: tuple[int, ...] = (0,)
    rank: int = 0

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
class Group(Ranks):
    """Ranks that can communicate.

    At size one there is no communication and no `handle`: the same code then runs without torch.distributed.
    """

    handle: dist.ProcessGroup | None = None


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
    """All groups this process belongs to; the defaults are those of a single process.

    Those that are only counted with are `Ranks`: a communicator takes time to create and memory to keep.
    """

    world: Group = Group()
    control: Group = Group()
    """The same ranks on a gloo communicator with a long timeout, for waiting while one rank works or saves."""
    tp: Group = Group()
    """Tensor parallel: ranks that split each weight matrix."""
    pp: Ranks = Ranks()
    """Pipeline parallel: ranks that hold the stages of one model replica."""
    pp_channels: PipelineChannels = PipelineChannels()
    """Connections between neighbouring stages of this rank's pipeline."""
    dp: Ranks = Ranks()
    """Data parallel: ranks that hold the same dense parameters and read different samples."""
    cp: Group = Group()
    """Context parallel: ranks that split a sequence."""
    tp_cp: Group = Group()
    """Ranks that hold the tokens of one microbatch between them, with sequence parallelism."""
    dp_cp: Group = Group()
    """Ranks whose dense gradients are averaged."""
    model: Ranks = Ranks()
    """One model replica of the dense parameters: tp x pp."""
    ep: Group = Group()
    """Expert parallel: ranks that share out the experts of a layer."""
    etp: Group = Group()
    """Expert tensor parallel: ranks that split each expert's matrices."""
    ep_etp: Group = Group()
    """Ranks that between them hold all experts of a layer, once."""
    edp: Group = Group()
    """Ranks that hold the same expert parameters, whose gradients are averaged."""
    expert_model: Ranks = Ranks()
    """One replica of all experts: etp x ep x pp."""


# One rank may work or save for long while the others wait for it.
CONTROL_TIMEOUT = timedelta(hours=6)

# Name -> axes of a grid that the group runs along; the remaining axes number its copies.
_RANKS_AXES = {"pp": ("pp",), "dp": ("dp",), "model": ("pp", "tp"), "expert_model": ("pp", "ep", "etp")}
_GROUP_AXES = {
    "tp": ("tp",), "cp": ("cp",), "tp_cp": ("cp", "tp"), "dp_cp": ("dp", "cp"),
    "ep": ("ep",), "etp": ("etp",), "ep_etp": ("ep", "etp"), "edp": ("edp",),
}  # fmt: skip

# Groups whose communication overlaps with that of the others.
_REPLICAS = {"dp_cp", "edp"}

# A message between two stages is small compared with what is computed at the same time, and each of these thread
# blocks takes a multiprocessor from that while it waits for the other side.
CHANNEL_CTAS = 4


def grid_sizes(config: ParallelConfig, world_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the axes of the dense and of the expert grid. Raises ValueError if the layout does not fit the world."""
    tp, cp, dp = config.tensor_model_parallel_size, config.context_parallel_size, config.data_parallel_size(world_size)
    pp, ep, etp = config.pipeline_model_parallel_size, config.expert_model_parallel_size, config.expert_tensor_parallel
    expert_model = pp * ep * etp
    if world_size % expert_model:
        raise ValueError(
            f"world size {world_size} is not divisible by pipeline ({pp}) x expert ({ep}) x expert-tensor ({etp}) "
            f"parallel size = {expert_model}: start a multiple of {expert_model} processes or change the layout"
        )
    expert = {"pp": pp, "edp": world_size // expert_model, "ep": ep, "etp": etp}
    return {"pp": pp, "dp": dp, "cp": cp, "tp": tp}, expert


def rank_lists(sizes: dict[str, int], axes: tuple[str, ...]) -> list[list[int]]:
    """The ranks of every group that runs along `axes` of a grid, in rank order within each group."""
    names = tuple(sizes)
    grid = torch.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    others = [names.index(name) for name in names if name not in axes]
    along = [names.index(name) for name in names if name in axes]
    return grid.permute(*others, *along).reshape(-1, math.prod(sizes[name] for name in axes)).tolist()


def build_process_groups(
    config: ParallelConfig, rank: int, world_size: int, timeout: timedelta | None = None, control_backend: str = "gloo"
) -> ProcessGroups:
    """Creates this process's groups; collective over all ranks of an initialised torch.distributed.

    All groups of a kind are created at once, so that the number of kinds and not of ranks decides how long that takes.
    The control group has the same `timeout` until `connect_control` has seen it work.
    Raises ValueError if the layout does not divide `world_size`.
    """
    dense, expert = grid_sizes(config, world_size)
    if world_size == 1:
        return ProcessGroups()
    world = Group(tuple(range(world_size)), rank, _world())
    # Groups with the same members share one communicator, since each costs memory on a GPU. But gradients are reduced
    # during the backward pass, at another moment on each rank, which must not mix with the model's own communication.
    made: dict[tuple[bool, str], dist.ProcessGroup] = {(False, str([list(world.ranks)])): _world()}

    def lists_along(axes: tuple[str, ...]) -> list[list[int]]:
        return rank_lists(dense if dense.keys() >= set(axes) else expert, axes)

    def group(name: str, lists: list[list[int]]) -> Group:
        key = (name in _REPLICAS, str(lists))
        if len(lists[0]) > 1 and key not in made:
            made[key] = _create(name, lists, rank, timeout)
        return Group(*_own(lists, rank), made.get(key))

    groups: dict[str, Any] = {name: Ranks(*_own(lists_along(axes), rank)) for name, axes in _RANKS_AXES.items()}
    groups |= {name: group(name, lists_along(axes)) for name, axes in _GROUP_AXES.items()}
    channels = _pipeline_channels(rank_lists(dense, ("pp",)), rank, config.interleaved, timeout)
    try:
        control = Group(world.ranks, rank, dist.new_group(backend=control_backend, timeout=timeout))
    except RuntimeError as error:
        raise network_error(error) from error
    return ProcessGroups(world=world, control=control, pp_channels=channels, **groups)


def _pipeline_channels(
    pipelines: list[list[int]], rank: int, interleaved: bool, timeout: timedelta | None
) -> PipelineChannels:
    """The connections of this rank; in an interleaved pipeline the last rank is also followed by the first.

    Channels with the same members do not share a communicator: see `pipeline_parallel.p2p_communication`. Every second
    pair of neighbours can be created at once; a ring of an odd number of ranks has one pair more than that.
    """
    own: dict[str, Group] = {}
    stages = len(pipelines[0])
    edges = stages if interleaved else stages - 1

    def colour(place: int) -> int:
        return 2 if interleaved and stages % 2 and place == edges - 1 else place % 2

    for number in sorted({colour(place) for place in range(edges)}):
        places = [place for place in range(edges) if colour(place) == number]
        ends = [(ranks[place], ranks[(place + 1) % stages]) for ranks in pipelines for place in places]
        for kind in ("forward", "backward"):
            lists = [sorted(pair) for pair in ends]
            handle = _create(f"{kind}_{number}", lists, rank, timeout, max_ctas=CHANNEL_CTAS)
            for pair, (sender, _) in zip(lists, ends, strict=True):
                if rank in pair:
                    name = f"{kind}_{'out' if (rank == sender) == (kind == 'forward') else 'in'}"
                    own[name] = Group(tuple(pair), pair.index(rank), handle)
    return PipelineChannels(**own)


def _own(lists: list[list[int]], rank: int) -> tuple[tuple[int, ...], int]:
    """The one of disjoint lists that has `rank`, and its place there."""
    ranks = next(ranks for ranks in lists if rank in ranks)
    return tuple(ranks), ranks.index(rank)


def _create(
    kind: str, lists: list[list[int]], rank: int, timeout: timedelta | None, max_ctas: int | None = None
) -> dist.ProcessGroup:
    """The communicator of this rank, of disjoint groups that are created at once; collective over all ranks.

    `max_ctas` bounds the thread blocks that an operation of NCCL runs on.
    """
    # torch names a group by its members and by how many groups the process has, which must agree among the members:
    # so every rank gets one of every kind, ranks without a partner a group of their own
    missing = set(range(dist.get_world_size())).difference(*lists)
    lists = [*lists, *([other] for other in sorted(missing))]
    world = _world()
    device = world.bound_device_id
    if device is not None and world._get_backend(device).supports_splitting:
        handle = dist.split_group(
            split_ranks=lists, timeout=timeout, pg_options=_nccl_options(max_ctas), group_desc=kind
        )
    elif device is not None:  # NCCL under TORCH_DISTRIBUTED_DEBUG=DETAIL: every rank takes part in creating every group
        handles = [dist.new_group(ranks, timeout=timeout, group_desc=kind) for ranks in lists]
        handle = next(handle for ranks, handle in zip(lists, handles, strict=True) if rank in ranks)
    else:
        ranks, _ = _own(lists, rank)
        handle = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=kind)
    assert handle is not None
    return handle


def connect_control(control: Group) -> None:
    """Connects the ranks of the control group within its timeout and gives it its long one; collective.

    Raises ValueError if they do not reach each other. With TORCH_GLOO_LAZY_INIT two ranks connect at their first
    message; those of these two operations are what later ones use, so that a network that does not work shows here.
    """
    if control.handle is None:
        return
    try:
        message = torch.zeros(1)
        collectives.all_gather([torch.empty(1) for _ in control.ranks], message, group=control.handle)
        collectives.broadcast(message, src=0, group=control.handle)
    except RuntimeError as error:
        raise network_error(error) from error
    control.handle.set_timeout(CONTROL_TIMEOUT)


def network_error(error: RuntimeError) -> ValueError:
    """What a user can do if the processes of a job do not reach each other."""
    # without the place in gloo's sources, and the condition there, that it puts first
    reason = re.sub(r"^\[enforce fail at [^]]*\] [^.]*\. ", "", str(error).partition("\n")[0])
    return ValueError(
        f"the processes cannot send messages to each other ({reason}): set GLOO_SOCKET_IFNAME, and on GPUs "
        "NCCL_SOCKET_IFNAME, to the network interface by which each machine reaches the others (`ip -brief address` "
        "lists them)"
    )


def _world() -> dist.ProcessGroup:
    """The communicator of all ranks, which torch.distributed has made when the process joined the job."""
    assert dist.group.WORLD is not None, "torch.distributed is not initialised"
    return dist.group.WORLD


def _nccl_options(max_ctas: int | None) -> Any:
    """Options of a new NCCL communicator; None for those of its parent, and in a torch that was built without NCCL."""
    if max_ctas is None or not dist.is_nccl_available():
        return None
    options = dist.ProcessGroupNCCL.Options()
    if hasattr(options.config, "max_ctas"):
        options.config.max_ctas = max_ctas
    return options
