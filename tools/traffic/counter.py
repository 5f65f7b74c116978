"""Counting every byte that this process gives to torch.distributed.

All of its operations pass through torch's dispatcher, where they are caught, so that none can be forgotten.
"""

from collections import Counter
from dataclasses import fields
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.core.parallel_state import ProcessGroups

# Operation in the dispatcher -> its name here, and the argument whose bytes are counted.
_OPERATIONS = {
    "allreduce_": ("all-reduce", "tensors"),
    "_allgather_base_": ("all-gather", "output_tensor"),
    "allgather_": ("all-gather", "output_tensors"),
    "_reduce_scatter_base_": ("reduce-scatter", "input_tensor"),
    "alltoall_base_": ("all-to-all", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "send": ("send", "tensors"),
}
_RECEIVING = {"recv_", "recv_any_source_"}  # counted by the sender


def _handles(groups: ProcessGroups) -> dict[str, str]:
    """Name of a group -> name of its communicator, where it has one; those between stages begin with `pp_`."""
    named: dict[str, Any] = {field.name: getattr(groups, field.name) for field in fields(groups)}
    channels = named.pop("pp_channels")
    named |= {f"pp_{field.name}": getattr(channels, field.name) for field in fields(channels)}
    handles = {name: getattr(group, "handle", None) for name, group in named.items()}
    return {name: handle.group_name for name, handle in handles.items() if handle is not None}


def group_labels(groups: ProcessGroups) -> dict[str, str]:
    """Name of a group -> its label; groups that share a communicator share a label, as in `tp=ep_etp`."""
    handles = _handles(groups)
    return {name: "=".join(other for other in handles if handles[other] == handles[name]) for name in handles}


class CommunicationCounter(TorchDispatchMode):
    """Within it, `bytes` grows: (operation, label of the group) -> bytes of its tensor.

    That is the whole tensor of an all-reduce, broadcast or send, the gathered one of an all-gather, and the one that is
    given away of a reduce-scatter or all-to-all, the rank's own share included. What `sent_share` of it leaves the
    rank depends on the algorithm.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        labels = group_labels(groups)
        self._labels = {handle: labels[name] for name, handle in _handles(groups).items()}
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts operations of torch.distributed, and carries out every operation."""
        if func.namespace == "c10d":
            self._count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if name in _RECEIVING:
            return
        values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        operation, counted = _OPERATIONS.get(name, (name, None))
        group = dist.ProcessGroup.unbox(values["process_group"]).group_name
        key = (operation, self._labels.get(group, f"unknown group {group}"))
        tensors = tree_leaves(values if counted is None else values[counted])
        self.bytes[key] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def sent_share(operation: str, group_size: int) -> float:
    """What part of the counted bytes each of `group_size` ranks sends: with rings, and direct messages to all.

    (n - 1)/n of what is gathered, scattered or exchanged, and twice that of what is all-reduced (arXiv:1802.05799).
    """
    part = (group_size - 1) / group_size
    return {"all-reduce": 2 * part, "all-gather": part, "reduce-scatter": part, "all-to-all": part}.get(operation, 1.0)
