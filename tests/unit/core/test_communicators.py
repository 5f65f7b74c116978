"""How many communicators a rank creates, and that members agree on what they create, at sizes that no machine has."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.config import ParallelConfig
from megatron.core.parallel_state import Group, ProcessGroups, build_process_groups, network_error

TP2, TP4 = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
PP2, PP4, PP8 = ({"pipeline_model_parallel_size": size} for size in (2, 4, 8))
PP3 = {"pipeline_model_parallel_size": 3}
V2 = {"num_virtual_stages_per_pipeline_rank": 2}
SP = {"sequence_parallel": True}
EP8 = {"expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1}
CP2 = {"context_parallel_size": 2}
CHANNELS = ("forward_in", "forward_out", "backward_in", "backward_out")
MOST = 16

LAYOUTS = {
    "8 tp4 pp2": (8, TP4 | PP2),
    "16 tp4 pp4": (16, TP4 | PP4),
    "64 tp4 pp4": (64, TP4 | PP4),
    "64 tp4 pp4 v2": (64, TP4 | PP4 | V2),
    "64 tp2 pp4 ep8": (64, TP2 | PP4 | EP8 | SP),
    "1024 tp4 pp4": (1024, TP4 | PP4),
    "1024 tp4 pp8 v2": (1024, TP4 | PP8 | V2),
    "1024 tp2 pp8 ep8 v2": (1024, TP2 | PP8 | EP8 | SP | V2),
    "4096 tp4 pp8": (4096, TP4 | PP8),
    "4096 tp4 pp8 v2": (4096, TP4 | PP8 | V2),
    "4096 tp2 pp8 ep8 v2": (4096, TP2 | PP8 | EP8 | SP | V2),
    "all kinds at once, an odd ring": (3 * 2 * 2 * 8, TP2 | PP3 | V2 | EP8 | SP | CP2),
    "two stages in a ring": (4, PP2 | V2),
    "an odd pipeline": (6, PP3),
    "only replicas": (8, {}),
    "replicas that are also who splits a sequence": (4, CP2 | PP2),
    "replicas that are also who shares the experts": (8, EP8),
}


class _Recorder:
    """Creations of communicators, recorded instead of carried out."""

    def __init__(self, world_size: int, device: object = None, splits: bool = True) -> None:
        self.world_size, self.bound_device_id, self.supports_splitting = world_size, device, splits
        self.splits: list[tuple[str, list[list[int]]]] = []
        self.new: list[dict[str, Any]] = []

    def _get_backend(self, device: object) -> "_Recorder":
        return self

    def split_group(self, *, split_ranks: list[list[int]], group_desc: str, **options: Any) -> object:
        self.splits.append((group_desc, split_ranks))
        return SimpleNamespace(kind=group_desc, **options)

    def new_group(self, ranks: list[int] | None = None, **options: Any) -> object:
        self.new.append({"ranks": ranks, **options})
        return object()


@contextmanager
def _recorded(monkeypatch: pytest.MonkeyPatch, recorder: _Recorder) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(parallel_state, "_world", lambda: recorder)
        patch.setattr(dist, "get_world_size", lambda: recorder.world_size)
        patch.setattr(dist, "split_group", recorder.split_group)
        patch.setattr(dist, "new_group", recorder.new_group)
        yield


def _channel(groups: ProcessGroups, name: str) -> Group:
    channel: Group = getattr(groups.pp_channels, name)
    return channel


def _ranks_to_try(world_size: int) -> list[int]:
    """Every rank of a small job; of a large one the first and last, and some that lie unevenly in between."""
    return list(range(world_size)) if world_size <= 16 else sorted({0, 1, 9, world_size // 3, world_size - 1})


@pytest.mark.parametrize("name", LAYOUTS)
def test_creations_on_nccl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind is one split, the same on all ranks, in which every rank has exactly one group."""
    world_size, settings = LAYOUTS[name]
    seen = []
    for rank in _ranks_to_try(world_size):
        recorder = _Recorder(world_size, device="cuda")
        with _recorded(monkeypatch, recorder):
            groups = build_process_groups(ParallelConfig(**settings), rank, world_size)
        assert len(recorder.splits) + len(recorder.new) + 1 <= MOST  # with that of all ranks
        assert [entry["backend"] for entry in recorder.new] == ["gloo"], "only the control group is made apart"
        for _, lists in recorder.splits:
            assert sorted(rank for ranks in lists for rank in ranks) == list(range(world_size))
            assert all(ranks == sorted(ranks) for ranks in lists)
        seen.append(recorder.splits)
        _check_communicators(groups, recorder)
    assert all(splits == seen[0] for splits in seen)


def _check_communicators(groups: ProcessGroups, recorder: _Recorder) -> None:
    """Whoever communicates has a communicator; those whose operations may overlap do not share one."""
    kinds = ("world", "control", "tp", "cp", "tp_cp", "dp_cp", "ep", "etp", "ep_etp", "edp")
    named = {kind: getattr(groups, kind) for kind in kinds}
    channels = {name: _channel(groups, name) for name in CHANNELS}
    for group in (*named.values(), *channels.values()):
        assert isinstance(group, Group) and (group.handle is not None) == (group.size > 1)
    assert groups.world.handle is recorder
    apart = [named["dp_cp"].handle, named["edp"].handle, *(group.handle for group in channels.values())]
    others = {id(group.handle) for kind, group in named.items() if kind not in ("dp_cp", "edp") and group.size > 1}
    assert not others & {id(handle) for handle in apart if handle is not None}
    between = [id(group.handle) for group in channels.values() if group.size > 1]
    assert len(set(between)) == len(between), "each kind of message between two ranks has its own"
    for counted in (groups.pp, groups.dp, groups.model, groups.expert_model):
        assert not hasattr(counted, "handle")


@pytest.mark.parametrize("name", LAYOUTS)
def test_creations_on_gloo(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank creates its own group of each kind, and all ranks equally many, by which torch names groups."""
    world_size, settings = LAYOUTS[name]
    counts = set()
    for rank in _ranks_to_try(world_size):
        recorder = _Recorder(world_size)
        with _recorded(monkeypatch, recorder):
            build_process_groups(ParallelConfig(**settings), rank, world_size)
        *kinds, control = recorder.new
        assert not recorder.splits and len(recorder.new) + 1 <= MOST
        assert control["ranks"] is None
        assert all(rank in entry["ranks"] and entry["use_local_synchronization"] for entry in kinds)
        counts.add(tuple(entry["group_desc"] for entry in kinds))
    assert len(counts) == 1


def test_nccl_that_cannot_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL hides that NCCL can: every rank then takes part in creating every group."""
    orders = []
    for rank in range(8):
        recorder = _Recorder(8, device="cuda", splits=False)
        with _recorded(monkeypatch, recorder):
            groups = build_process_groups(ParallelConfig(**TP2 | PP2), rank, 8)
        assert groups.tp.size == 2 and groups.pp_channels.forward_in.size == (2 if rank >= 4 else 1)
        assert not any(entry.get("use_local_synchronization") for entry in recorder.new)
        orders.append([entry["ranks"] for entry in recorder.new])
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize(("settings", "world_size"), [(PP2, 4), (PP3, 6), (PP2 | V2, 4), (PP3 | V2, 6), (PP4 | V2, 8)])
def test_both_ends_of_a_channel_agree(
    settings: dict[str, int], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one rank sends, the other receives in a group of the same creation; no rank has more than that."""
    config = ParallelConfig(**settings)
    built = {}
    for rank in range(world_size):
        recorder = _Recorder(world_size, device="cuda")
        with _recorded(monkeypatch, recorder):
            built[rank] = build_process_groups(config, rank, world_size)
    open_ends = {(rank, name) for rank in built for name in CHANNELS if _channel(built[rank], name).size == 2}
    for rank, groups in built.items():
        if groups.pp.is_last and not config.interleaved:
            continue
        following = groups.pp.ranks[(groups.pp.rank + 1) % groups.pp.size]
        for kind, sender, receiver in (("forward", rank, following), ("backward", following, rank)):
            ends = {(sender, f"{kind}_out"), (receiver, f"{kind}_in")}
            assert ends <= open_ends
            open_ends -= ends
            sending, receiving = (
                _channel(built[end], name) for end, name in sorted(ends, key=lambda e: e[0] != sender)
            )
            assert sending.ranks == receiving.ranks == tuple(sorted((rank, following)))
            assert (sending.ranks[sending.rank], receiving.ranks[receiving.rank]) == (sender, receiver)
            assert sending.handle.kind == receiving.handle.kind
    assert not open_ends


def test_channels_run_on_few_thread_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those between stages: all others need what bandwidth they get."""

    class Options:
        def __init__(self) -> None:
            self.config = SimpleNamespace(max_ctas=None)

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    with _recorded(monkeypatch, _Recorder(8, device="cuda")):
        groups = build_process_groups(ParallelConfig(**TP2 | PP2), 0, 8)
    for group in (groups.tp, groups.dp_cp, groups.edp):
        assert group.handle.pg_options is None
    for group in (groups.pp_channels.forward_out, groups.pp_channels.backward_in):
        assert group.handle.pg_options.config.max_ctas == 4


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("[enforce fail at /a/gloo/device.cc:84] ifa != nullptr. Unable to find address for: nope0", "Unable to find"),
        (
            "wait timeout after 3000ms, keys: /0/1\nException raised from doWait",
            "wait timeout after 3000ms, keys: /0/1",
        ),
        ("Broken pipe", "Broken pipe"),
    ],
)
def test_a_network_that_does_not_work_is_one_sentence(said: str, reason: str) -> None:
    sentence = str(network_error(RuntimeError(said)))
    assert f"({reason}" in sentence and "\n" not in sentence and "set GLOO_SOCKET_IFNAME" in sentence
