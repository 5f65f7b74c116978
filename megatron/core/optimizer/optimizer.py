"""A rule's updates on flat full-precision masters, whole or sharded over the data-parallel ranks (ZeRO-1)."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.core.distributed.gradient_buffers import ALIGNMENT, Bucket, GradientBuffers, Piece
from megatron.core.fusions.stored import StateType, Stored, Zeros, narrow_, new_stored
from megatron.core.host_memory import HostMemory, zeros
from megatron.core.microbatch import GradientFactors
from megatron.core.optimizer.clip_grads import gradient_norm, own_gradients
from megatron.core.optimizer.loss_scaler import new_loss_scaler
from megatron.core.optimizer.offload import HostUpdates, on_the_host
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
    state: dict[str, Stored]
    """`end - start` elements by `state_names` of the optimizer."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors: views where numbers are kept as such, copies where they are not."""
        return {name: stored.read() for name, stored in self.state.items()}


class _Part(NamedTuple):
    """A part of a bucket that this rank updates, its state on the device or in the host's memory."""

    bucket: Bucket
    place: slice
    state: dict[str, Stored]
    """Masters and the rule's state."""
    on_host: bool


class MixedPrecisionOptimizer:
    """Keeps float32 masters of 16-bit parameters, which a rule updates; wider parameters are their own masters.

    Masters have 4 bytes a parameter in 16-bit types, or 2 besides those of the weights; the rule's tensors have the
    types that it says. All are divided by the number of ranks that hold the parameter if the optimizer is distributed.
    With `optimizer_cpu_offload` a share of them is in `memory`; raises ValueError if there is not so much.
    """

    def __init__(
        self,
        buffers: GradientBuffers,
        rule: UpdateRule,
        config: OptimizerConfig,
        groups: ProcessGroups,
        memory: HostMemory | None = None,
    ) -> None:
        self.buffers, self.rule, self.config, self.groups = buffers, rule, config, groups
        self.steps_taken = 0
        self.scaler = new_loss_scaler(config, any(b.weights.dtype == torch.float16 for b in buffers.buckets))
        memory = memory or HostMemory()
        self._parts = self._new_parts(memory)
        segments = [(segment, part.on_host) for part in self._parts for segment in self._cut(part)]
        self.segments = [segment for segment, _ in segments]
        self._device_segments = [segment for segment, on_host in segments if not on_host]
        self._host_updates = HostUpdates(
            [segment for segment, on_host in segments if on_host],
            buffers.buckets[0].weights.device,
            memory,
            pin_grads=not config.no_pin_cpu_grads,
            pin_weights=not config.no_pin_cpu_params,
        )
        self._own_gradients = own_gradients(buffers, groups)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the tensors that are kept of each parameter."""
        return (MASTER, *self.rule.state_types)

    @property
    def device_bytes(self) -> int:
        """Of the state on the device; masters that are the weights take none."""
        return sum(self._kept_bytes(part.state) for part in self._parts if not part.on_host)

    @property
    def host_bytes(self) -> int:
        """Of the state in the host's memory, and of the buffers on the way there; 0 without `optimizer_cpu_offload`."""
        state = sum(self._kept_bytes(part.state) for part in self._parts if part.on_host)
        return state + self._host_updates.staging_bytes

    def _kept_bytes(self, state: dict[str, Stored]) -> int:
        weights = {bucket.weights.untyped_storage()._cdata for bucket in self.buffers.buckets}
        tensors = [tensor for kept in state.values() for tensor in (kept.data, kept.exponents) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage()._cdata not in weights)

    def _new_parts(self, memory: HostMemory) -> list[_Part]:
        buckets, places = self.buffers.buckets, [self.buffers.owned(bucket) for bucket in self.buffers.buckets]
        shares = [0] * len(buckets)
        if self.config.optimizer_cpu_offload:
            shares = on_the_host((place.stop - place.start for place in places), self.config.optimizer_offload_fraction)
            samples = [self._new_state(bucket.weights[:ALIGNMENT], zeros) for bucket in buckets]
            kept = [self._kept_bytes(sample) for sample in samples]
            memory.claim(sum(share * size // ALIGNMENT for share, size in zip(shares, kept, strict=True)))

        def host_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
            return memory.zeros(size, dtype)

        parts = []
        for bucket, place, share in zip(buckets, places, shares, strict=True):
            cut = place.start + share
            for piece, on_host in ((slice(place.start, cut), True), (slice(cut, place.stop), False)):
                if piece.start < piece.stop:
                    state = self._new_state(bucket.weights[piece], host_zeros if on_host else zeros)
                    parts.append(_Part(bucket, piece, state, on_host))
        return parts

    def _new_state(self, weights: Tensor, new: Zeros) -> dict[str, Stored]:
        """Masters and the rule's state of weights [n], in memory made by `new`."""
        state = {name: new_stored(kind, weights, new) for name, kind in self.rule.state_types.items()}
        if weights.dtype == torch.promote_types(weights.dtype, torch.float32):
            return {MASTER: Stored(weights), **state}
        master = new_stored(StateType(self.config.main_params_dtype), weights, new)
        if master.plain:  # without remainders, masters are the weights already
            master.write(weights)
        return {MASTER: master, **state}

    def _cut(self, part: _Part) -> Iterator[Segment]:
        """The runs of one kind in a part of a bucket."""
        bucket, master = part.bucket, part.state[MASTER]
        held = master.weights is not None or master.data.dtype == bucket.weights.dtype
        weights = None if held else bucket.weights
        for kind, run in itertools.groupby(bucket.pieces(part.place), key=self._kind):
            pieces = tuple(run)
            start, end = pieces[0].offset, pieces[-1].offset + pieces[-1].end - pieces[-1].start
            place = slice(start - part.place.start, end - part.place.start)
            yield Segment(
                kind=kind,
                pieces=tuple(piece._replace(offset=piece.offset - start) for piece in pieces),
                master=master.part(place),
                state={name: part.state[name].part(place) for name in self.rule.state_types},
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
        self._host_updates.begin()
        norm = gradient_norm(self._own_gradients, losses, self.groups.world) / scale
        overflow = not math.isfinite(norm)
        result = StepResult(not overflow, norm, scale, self.scaler.can_lower)
        self.scaler.update(overflow)
        if overflow:
            return result
        clip = self.config.clip_grad
        factor = GradientFactors(loss_scale=scale).update(clip / (norm + 1e-6) if clip and norm > clip else 1.0)
        self.steps_taken += 1

        def apply(segment: Segment) -> None:
            kind = segment.kind
            update = Update(
                number=self.steps_taken,
                learning_rate=rates.vocabulary_learning_rate if kind.vocabulary else rates.learning_rate,
                weight_decay=rates.weight_decay if kind.decayed else 0.0,
                factor=factor,
            )
            self.rule.update(segment, update)

        for segment in self._device_segments:  # a GPU is only told to, and works on them while the host does its own
            apply(segment)
        self._host_updates.run(apply)
        self.buffers.gather_parameters()
        return result

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Resets the masters to the model's parameters, after weights were loaded into it."""
        for segment in self.segments:
            weights = segment.master.weights if segment.weights is None else segment.weights
            if weights is not None:
                segment.master.write(weights)

    def state_pieces(self) -> Iterator[StatePiece]:
        """The state that this rank keeps, parameter by parameter; empty where another rank owns all of one.

        To load, write to the state on every rank, then call `finish_loading`.
        """
        for segment in self.segments:
            for piece in segment.pieces:
                place = slice(piece.offset, piece.offset + piece.end - piece.start)
                state = {name: flat.part(place) for name, flat in {MASTER: segment.master, **segment.state}.items()}
                yield StatePiece(self.buffers.names[piece.parameter], piece.parameter, piece.start, piece.end, state)

    def scalars(self) -> dict[str, float]:
        """The part of the state that is no tensor, the same on all ranks; plain numbers by name."""
        return {"steps_taken": self.steps_taken, **self.scaler.state()}

    @torch.no_grad()
    def finish_loading(self, scalars: dict[str, float]) -> None:
        """Takes back what `scalars` gave, and the weights from the masters written before; collective."""
        self.steps_taken = int(scalars["steps_taken"])
        self.scaler.load(scalars)
        for segment in self.segments:
            if segment.weights is not None:
                narrow_(segment.weights, segment.master.data)
        self.buffers.gather_parameters()
        self.buffers.wait_for_parameters()

    @torch.no_grad()
    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """The state by the parameters' names, on the CPU, shards brought together; collective over dp x cp and edp.

        Ranks that do not `keep` it take part and get an empty dictionary.
        """
        whole: dict[str, Any] = {}
        for bucket in self.buffers.buckets:
            for name in self.state_names:
                for place, values in self.buffers.gathered(bucket, functools.partial(self._read, bucket, name)):
                    for piece in bucket.pieces(place) if keep else ():
                        kept = whole.setdefault(self.buffers.names[piece.parameter], {})
                        if name not in kept:
                            kept[name] = torch.empty(piece.parameter.shape, dtype=values.dtype)
                        begin = piece.offset - place.start
                        part = values[begin : begin + piece.end - piece.start]
                        kept[name].view(-1)[piece.start : piece.end].copy_(part)
        return {"scalars": self.scalars(), "parameters": whole} if keep else {}

    def _read(self, bucket: Bucket, name: str, place: slice) -> Tensor:
        """A part of one tensor of what this rank keeps of a bucket, on its device."""
        first, found = self.buffers.owned(bucket).start, []
        for part in self._parts:
            begin = max(place.start + first, part.place.start) - part.place.start
            end = min(place.stop + first, part.place.stop) - part.place.start
            if part.bucket is bucket and begin < end:
                found.append(part.state[name].part(slice(begin, end)).read().to(bucket.weights.device))
        return found[0] if len(found) == 1 else torch.cat(found)

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
            for key, stored in piece.state.items():
                values = state["parameters"][piece.name][key].reshape(-1)[piece.start : piece.end]
                stored.write(values.to(stored.data.device))
        self.finish_loading(state["scalars"])
