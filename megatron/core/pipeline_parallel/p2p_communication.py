"""Sending hidden states to the next stage and their gradients to the previous one."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.parallel_state import Group


@dataclass(frozen=True)
class StageLink:
    """A stage's connections: hidden states of one shape flow forward, gradients of the same shape backward."""

    pp: Group
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def exchange(
        self,
        *,
        to_next: Tensor | None = None,
        to_previous: Tensor | None = None,
        from_next: bool = False,
        from_previous: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sends and receives at once; returns what came from the next and from the previous stage.

        Requests that would leave the pipeline at either end are skipped.
        """
        operations: list[dist.P2POp] = []
        received: dict[str, Tensor] = {}
        if not self.pp.is_last:
            received |= self._add(operations, self.pp.ranks[self.pp.rank + 1], to_next, from_next, "next")
        if not self.pp.is_first:
            received |= self._add(operations, self.pp.ranks[self.pp.rank - 1], to_previous, from_previous, "previous")
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return received.get("next"), received.get("previous")

    def _add(
        self, operations: list[dist.P2POp], peer: int, outgoing: Tensor | None, incoming: bool, name: str
    ) -> dict[str, Tensor]:
        if outgoing is not None:
            operations.append(dist.P2POp(dist.isend, outgoing.detach().contiguous(), peer, self.pp.handle))
        if not incoming:
            return {}
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        operations.append(dist.P2POp(dist.irecv, tensor, peer, self.pp.handle))
        return {name: tensor}
