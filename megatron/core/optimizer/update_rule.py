"""What `MixedPrecisionOptimizer` and the rule that it applies know of each other."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron.core.distributed.gradient_buffers import Piece
from megatron.core.fusions.stored import StateType, Stored


class ParameterKind(NamedTuple):
    """What decides about a parameter's hyperparameters."""

    decayed: bool
    vocabulary: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """A run of neighbouring parameters of one kind, or the parts of them that this rank updates; flat tensors [n]."""

    kind: ParameterKind
    pieces: tuple[Piece, ...]
    """The parameters; their offsets are places in the segment. Padding between them belongs to none and stays zero."""
    master: Stored
    """Float32, or float64 for parameters in float64; or the weights and their remainders."""
    state: dict[str, Stored]
    """By the rule's names, in the rule's types; zeros before the first update."""
    grad: Tensor
    """Of any type."""
    weights: Tensor | None
    """Those of the model in their narrower type, to be set by `narrow_`; None if the masters are the weights or hold
    them."""

    def part(self, start: int, end: int) -> "Segment":
        """Elements `start` to `end`, as views of the same memory."""
        place = slice(start, end)
        pieces = []
        for piece in self.pieces:
            first, last = max(start - piece.offset, 0), min(end - piece.offset, piece.end - piece.start)
            if first < last:
                offset = piece.offset + first - start
                pieces.append(Piece(piece.parameter, piece.start + first, piece.start + last, offset))
        return replace(
            self,
            pieces=tuple(pieces),
            master=self.master.part(place),
            state={name: stored.part(place) for name, stored in self.state.items()},
            grad=self.grad[place],
            weights=None if self.weights is None else self.weights[place],
        )


class Update(NamedTuple):
    """The numbers of one update of a segment."""

    number: int
    """Updates including this one; skipped steps do not count."""
    learning_rate: float
    weight_decay: float
    factor: float
    """What gradients are multiplied by first: clipping, and the loss scale's reciprocal."""


class UpdateRule(Protocol):
    """Updates masters from gradients; it knows nothing of communication, loss scaling and checkpoints.

    With the distributed optimizer, and in the host's memory (`offload.py`), segments begin and end anywhere in a
    parameter, which suits elementwise rules.
    A rule of whole matrices (Muon) finds them in `segment.pieces` and updates other parameters as AdamW does. It needs

    - an option of `GradientBuffers` that ends shards at whole parameters; now they may cut any of them;
    - `spec_of(piece.parameter)`: of a matrix split by tensor parallelism a rank holds one part, and the experts of a
      rank are stacked in one parameter;
    - state names that depend on the parameter, if matrices are to have no second moments; now all have the same.
    """

    @property
    def state_types(self) -> dict[str, StateType]:
        """What it keeps besides the master, by its name in checkpoints; a rule reads what is `plain` in place."""

    def update(self, segment: Segment, numbers: Update) -> None:
        """Updates master, state and weights in place from the gradient, which may be overwritten."""
