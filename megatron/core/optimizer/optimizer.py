"""AdamW (arXiv:1711.05101) on flat full-precision masters, whole or sharded over the data-parallel ranks (ZeRO-1)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.distributed.gradient_buffers import Bucket, GradientBuffers
from megatron.core.fusions.adamw import AdamWStep, adamw_
from megatron.core.host_memory import zeros
from megatron.core.optimizer.clip_grads import counted_gradients, gradient_norm
from megatron.core.optimizer.loss_scaler import new_loss_scaler
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_scheduler import StepRates
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import spec_of

STATE_NAMES = ("master", "exp_avg", "exp_avg_sq")


class StepResult(NamedTuple):
    """What one optimizer step did."""

    updated: bool
    """False if the gradients were not finite; then no parameter changed."""
    grad_norm: float
    """Global gradient norm before clipping, without the loss scale."""
    loss_scale: float = 1.0
    """The scale that the loss of this step had."""
    blames_scale: bool = False
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
    """`master`, `exp_avg`, `exp_avg_sq`: flat views of `end - start` elements; writing to them sets the state."""


class _ParameterKind(NamedTuple):
    """What decides about a parameter's hyperparameters."""

    decayed: bool
    vocabulary: bool


@dataclass(eq=False)
class _BucketState:
    """Masters and moments of the part of a bucket that this rank updates, flat."""

    bucket: Bucket
    part: slice
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    segments: list[tuple[_ParameterKind, slice]]
    """Runs of one kind, and their place in the part."""

    @property
    def has_own_master(self) -> bool:
        """Whether the master is another tensor than the weights."""
        return self.master.dtype != self.bucket.weights.dtype


class MixedPrecisionAdamW:
    """Keeps float32 masters of 16-bit parameters; float32 and float64 parameters are their own masters.

    Bytes a parameter beside weights and gradients: 12 in 16-bit types, 8 in float32, 16 in float64; divided by the
    number of ranks that hold the parameter if the optimizer is distributed.
    """

    def __init__(self, buffers: GradientBuffers, config: OptimizerConfig, groups: ProcessGroups) -> None:
        self.config, self.buffers, self.groups = config, buffers, groups
        self.steps_taken = 0
        self.scaler = new_loss_scaler(config, any(b.weights.dtype == torch.float16 for b in buffers.buckets))
        self._states = [self._new_state(bucket) for bucket in buffers.buckets]
        self._counted = counted_gradients(buffers, groups)

    def _kind(self, parameter: nn.Parameter) -> _ParameterKind:
        spec = spec_of(parameter)
        return _ParameterKind(spec.weight_decay or self.config.apply_wd_to_norms, spec.is_vocabulary)

    def _new_state(self, bucket: Bucket) -> _BucketState:
        part = self.buffers.owned(bucket)
        weights = bucket.weights[part]
        master_type = torch.promote_types(weights.dtype, torch.float32)
        exp_avg, exp_avg_sq = (zeros(weights.numel(), master_type, weights.device) for _ in range(2))
        master = weights
        if weights.dtype != master_type:
            master = zeros(weights.numel(), master_type, weights.device).copy_(weights)
        runs: list[tuple[_ParameterKind, slice]] = []
        for piece in bucket.pieces(part):
            kind, start, end = self._kind(piece.parameter), piece.offset, piece.offset + piece.end - piece.start
            if runs and runs[-1][0] == kind:
                start = runs.pop()[1].start + part.start
            runs.append((kind, slice(start - part.start, end - part.start)))
        if not runs:  # nothing but padding, in a model with fewer elements than a shard
            runs.append((self._kind(bucket.parameters[-1]), slice(0, master.numel())))
        return _BucketState(bucket, part, master, exp_avg, exp_avg_sq, runs)

    @torch.no_grad()
    def step(self, rates: StepRates, losses: Tensor | None = None) -> StepResult:
        """Clips the finalised gradients and updates, or leaves everything alone if they or `losses` are not finite.

        `losses` is any scalar that is finite if this rank's losses are. The gradients are those of the loss times
        `scaler.scale`. Collective over the whole job; all ranks return the same.
        """
        if losses is None:
            losses = self.buffers.buckets[0].grads.new_zeros(())
        scale = self.scaler.scale
        norm = gradient_norm(self._counted, losses, self.groups.world) / scale
        overflow = not math.isfinite(norm)
        result = StepResult(not overflow, norm, scale, self.scaler.can_lower)
        self.scaler.update(overflow)
        if overflow:
            return result
        clip = self.config.clip_grad
        factor = (clip / (norm + 1e-6) if clip and norm > clip else 1.0) / scale
        self.steps_taken += 1
        for state in self._states:
            grads = state.bucket.grads[state.part]
            weights = state.bucket.weights[state.part] if state.has_own_master else None
            for kind, place in state.segments:
                adamw_(
                    state.master[place],
                    state.exp_avg[place],
                    state.exp_avg_sq[place],
                    grads[place],
                    AdamWStep(
                        number=self.steps_taken,
                        learning_rate=rates.vocabulary_learning_rate if kind.vocabulary else rates.learning_rate,
                        beta1=self.config.adam_beta1,
                        beta2=self.config.adam_beta2,
                        epsilon=self.config.adam_eps,
                        weight_decay=rates.weight_decay if kind.decayed else 0.0,
                        factor=factor,
                    ),
                    None if weights is None else weights[place],
                )
        self.buffers.gather_parameters()
        return result

    def _copy_masters_to_weights(self) -> None:
        for state in self._states:
            if state.has_own_master:
                state.bucket.weights[state.part].copy_(state.master)
        self.buffers.gather_parameters()

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Takes the masters anew from the model's parameters, after weights were loaded into it."""
        for state in self._states:
            if state.has_own_master:
                state.master.copy_(state.bucket.weights[state.part])

    def state_pieces(self) -> Iterator[StatePiece]:
        """The state that this rank keeps, parameter by parameter; empty where another rank owns all of one.

        To load, write to the tensors on every rank, then call `finish_loading`.
        """
        for state in self._states:
            for piece in state.bucket.pieces(state.part):
                start = piece.offset - state.part.start
                place = slice(start, start + piece.end - piece.start)
                tensors = {name: getattr(state, name)[place] for name in STATE_NAMES}
                yield StatePiece(self.buffers.names[piece.parameter], piece.parameter, piece.start, piece.end, tensors)

    def scalars(self) -> dict[str, float]:
        """The part of the state that is no tensor, the same on all ranks; plain numbers by name."""
        return {"steps_taken": self.steps_taken, **self.scaler.state()}

    @torch.no_grad()
    def finish_loading(self, scalars: dict[str, float]) -> None:
        """Takes back what `scalars` gave, and the weights from the masters written before; collective."""
        self.steps_taken = int(scalars["steps_taken"])
        self.scaler.load(scalars)
        self._copy_masters_to_weights()
        self.buffers.wait_for_parameters()

    @torch.no_grad()
    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """The state by the parameters' names, on the CPU, shards brought together; collective over dp x cp and edp.

        Ranks that do not `keep` it take part and get an empty dictionary.
        """
        whole: dict[str, Any] = {}
        for state in self._states:
            bucket = state.bucket
            for name in STATE_NAMES:
                flat = getattr(state, name)
                if self.buffers.sharded and bucket.group.size > 1:
                    flat = flat.new_empty(bucket.weights.numel())
                    dist.all_gather(
                        list(flat.chunk(bucket.group.size)), getattr(state, name), group=bucket.group.handle
                    )
                if keep:
                    for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True):
                        values = flat[offset : offset + parameter.numel()].view_as(parameter)
                        whole.setdefault(self.buffers.names[parameter], {})[name] = values.to("cpu", copy=True)
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
            for key in STATE_NAMES:
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
