"""A rule's updates on flat full-precision masters, whole or sharded over the data-parallel ranks (ZeRO-1)."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.core.distributed.gradient_buffers import Bucket, GradientBuffers, Piece
from megatron.core.host_memory import zeros
from megatron.core.microbatch import GradientFactors
from megatron.core.optimizer.clip_grads import gradient_norm, own_gradients
from megatron.core.optimizer.loss_scaler import new_loss_scaler
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_scheduler import StepRates
from megatron.core.optimizer.update_rule import ParameterKind, Segment, Update, UpdateRule
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import spec_of

MASTER = "master"
"""Name of the masters next to the rule's state in `StatePiece.tensors` and checkpoints."""


class StepResult(NamedTuple):
    """What one optimizer step did."""

    updated: bool
    """False if the gradients were not finite; then no parameter changed."""
    grad_norm: float
    """Global gradient norm before clipping, without the loss scale."""
    loss_scale: float = 1.0
    """The scale that the loss of this step had."""
    overflow_may_be_the_scale: bool = False
    """If not updated: whether a lower loss scale may help."""


class StatePiece(NamedTuple):
    """The optimizer's state of a part of one parameter, on the rank that updates it."""

    name: str
    """Name of the parameter on this rank (see `GradientBuffers.names`)."""
    parameter: nn.Parameter
    start: int
    """First element in the parameter of this rank, flattened."""
    end: int
    """Element after the last one."""
    tensors: dict[str, Tensor]
    """Flat views of `end - start` elements by `state_names` of the optimizer; writing to them sets the state."""


class MixedPrecisionOptimizer:
    """Keeps float32 masters of 16-bit parameters, which a rule updates; wider parameters are their own masters.

    Masters have 4 bytes a parameter in 16-bit types, and the rule's tensors the masters' type; all are divided by the
    number of ranks that hold the parameter if the optimizer is distributed.
    """

    def __init__(
        self, buffers: GradientBuffers, rule: UpdateRule, config: OptimizerConfig, groups: ProcessGroups
    ) -> None:
        self.buffers, self.rule, self.config, self.groups = buffers, rule, config, groups
        self.steps_taken = 0
        self.scaler = new_loss_scaler(config, any(b.weights.dtype == torch.float16 for b in buffers.buckets))
        self._states = [self._new_state(bucket) for bucket in buffers.buckets]
        self._segments = [
            segment
            for bucket, state in zip(buffers.buckets, self._states, strict=True)
            for segment in self._cut(bucket, state)
        ]
        self._own_gradients = own_gradients(buffers, groups)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the tensors that are kept of each parameter."""
        return (MASTER, *self.rule.state_names)

    def _new_state(self, bucket: Bucket) -> dict[str, Tensor]:
        """Masters and the rule's state of the part of a bucket that this rank updates, flat."""
        weights = bucket.weights[self.buffers.owned(bucket)]
        master_type = torch.promote_types(weights.dtype, torch.float32)
        state = {name: zeros(weights.numel(), master_type, weights.device) for name in self.rule.state_names}
        if weights.dtype == master_type:
            return {MASTER: weights, **state}
        return {MASTER: zeros(weights.numel(), master_type, weights.device).copy_(weights), **state}

    def _cut(self, bucket: Bucket, state: dict[str, Tensor]) -> Iterator[Segment]:
        """The runs of one kind in the part of a bucket that this rank updates."""
        part = self.buffers.owned(bucket)
        weights = None if state[MASTER].dtype == bucket.weights.dtype else bucket.weights
        for kind, run in itertools.groupby(bucket.pieces(part), key=self._kind):
            pieces = tuple(run)
            start, end = pieces[0].offset, pieces[-1].offset + pieces[-1].end - pieces[-1].start
            place = slice(start - part.start, end - part.start)
            yield Segment(
                kind=kind,
                pieces=tuple(piece._replace(offset=piece.offset - start) for piece in pieces),
                master=state[MASTER][place],
                state={name: state[name][place] for name in self.rule.state_names},
                grad=bucket.grads[start:end],
                weights=None if weights is None else weights[start:end],
            )

    def _kind(self, piece: Piece) -> ParameterKind:
        spec = spec_of(piece.parameter)
        return ParameterKind(spec.weight_decay or self.config.apply_wd_to_norms, spec.is_vocabulary)

    @torch.no_grad()
    def step(self, rates: StepRates, losses: Tensor | None = None) -> StepResult:
        """Clips the finalised gradients and updates, or leaves everything alone if they or `losses` are not finite.

        `losses` is any scalar that is finite if this rank's losses are. The gradients are those of the loss times
        `scaler.scale`. Collective over the whole job; all ranks return the same.
        """
        if losses is None:
            losses = self.buffers.buckets[0].grads.new_zeros(())
        scale = self.scaler.scale
        norm = gradient_norm(self._own_gradients, losses, self.groups.world) / scale
        overflow = not math.isfinite(norm)
        result = StepResult(not overflow, norm, scale, self.scaler.can_lower)
        self.scaler.update(overflow)
        if overflow:
            return result
        clip = self.config.clip_grad
        factor = GradientFactors(loss_scale=scale).update(clip / (norm + 1e-6) if clip and norm > clip else 1.0)
        self.steps_taken += 1
        for segment in self._segments:
            kind = segment.kind
            update = Update(
                number=self.steps_taken,
                learning_rate=rates.vocabulary_learning_rate if kind.vocabulary else rates.learning_rate,
                weight_decay=rates.weight_decay if kind.decayed else 0.0,
                factor=factor,
            )
            self.rule.update(segment, update)
        self.buffers.gather_parameters()
        return result

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Resets the masters to the model's parameters, after weights were loaded into it."""
        for segment in self._segments:
            if segment.weights is not None:
                segment.master.copy_(segment.weights)

    def state_pieces(self) -> Iterator[StatePiece]:
        """The state that this rank keeps, parameter by parameter; empty where another rank owns all of one.

        To load, write to the tensors on every rank, then call `finish_loading`.
        """
        for segment in self._segments:
            for piece in segment.pieces:
                place = slice(piece.offset, piece.offset + piece.end - piece.start)
                tensors = {name: flat[place] for name, flat in {MASTER: segment.master, **segment.state}.items()}
                yield StatePiece(self.buffers.names[piece.parameter], piece.parameter, piece.start, piece.end, tensors)

    def scalars(self) -> dict[str, float]:
        """The part of the state that is no tensor, the same on all ranks; plain numbers by name."""
        return {"steps_taken": self.steps_taken, **self.scaler.state()}

    @torch.no_grad()
    def finish_loading(self, scalars: dict[str, float]) -> None:
        """Takes back what `scalars` gave, and the weights from the masters written before; collective."""
        self.steps_taken = int(scalars["steps_taken"])
        self.scaler.load(scalars)
        for segment in self._segments:
            if segment.weights is not None:
                segment.weights.copy_(segment.master)
        self.buffers.gather_parameters()
        self.buffers.wait_for_parameters()

    @torch.no_grad()
    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """The state by the parameters' names, on the CPU, shards brought together; collective over dp x cp and edp.

        Ranks that do not `keep` it take part and get an empty dictionary.
        """
        whole: dict[str, Any] = {}
        for bucket, state in zip(self.buffers.buckets, self._states, strict=True):
            for name, own in state.items():
                for place, values in self.buffers.gathered(bucket, own.__getitem__):
                    for piece in bucket.pieces(place) if keep else ():
                        kept = whole.setdefault(self.buffers.names[piece.parameter], {})
                        if name not in kept:
                            kept[name] = torch.empty(piece.parameter.shape, dtype=own.dtype)
                        begin = piece.offset - place.start
                        part = values[begin : begin + piece.end - piece.start]
                        kept[name].view(-1)[piece.start : piece.end].copy_(part)
        return {"scalars": self.scalars(), "parameters": whole} if keep else {}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError, naming parameters, if `state` is not of this model."""
        if set(state) != {"scalars", "parameters"} or state["scalars"].keys() != self.scalars().keys():
            raise ValueError("the optimizer state was not saved by this version of the program")
        shapes = {name: parameter.shape for parameter, name in self.buffers.names.items()}
        saved = state["parameters"]
        if saved.keys() != shapes.keys():
            different = sorted(saved.keys() ^ shapes.keys())
            raise ValueError(f"the optimizer state belongs to another model: {different[:5]} differ")
        for name, shape in shapes.items():
            for key in self.state_names:
                if key not in saved[name]:
                    raise ValueError(f"the optimizer state holds no {key} of {name}")
                if saved[name][key].shape != shape:
                    raise ValueError(
                        f"the optimizer's {key} of {name} has shape {tuple(saved[name][key].shape)}, not {tuple(shape)}"
                    )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned and `check_state_dict` accepts; collective over dp x cp and edp."""
        for piece in self.state_pieces():
            for key, tensor in piece.tensors.items():
                tensor.copy_(state["parameters"][piece.name][key].reshape(-1)[piece.start : piece.end])
        self.finish_loading(state["scalars"])
