"""What waits for other ranks, under the names that torch.distributed has for it: all of megatron calls it here.

A rank counts as waiting in these calls (`megatron.core.waiting`); `tests/unit/test_waits.py` finds others.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from megatron.core.waiting import waiting

P = ParamSpec("P")
T = TypeVar("T")


def _marked(function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def marked(*args: P.args, **kwargs: P.kwargs) -> T:
        with waiting():
            return function(*args, **kwargs)

    return marked


all_gather = _marked(dist.all_gather)
all_gather_object = _marked(dist.all_gather_object)
all_reduce = _marked(dist.all_reduce)
all_to_all_single = _marked(dist.all_to_all_single)
batch_isend_irecv = _marked(dist.batch_isend_irecv)
broadcast = _marked(dist.broadcast)
broadcast_object_list = _marked(dist.broadcast_object_list)
gather_object = _marked(dist.gather_object)
irecv = _marked(dist.irecv)
isend = _marked(dist.isend)
# torch 2.13 renamed these two and warns about the old names; torch 2.11 has only those.
all_gather_single = _marked(getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
reduce_scatter_single = _marked(getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)


def wait(work: dist.Work) -> None:
    """Returns when communication that was begun is done (on a GPU: for what is launched from now on)."""
    with waiting():
        work.wait()
