"""AdamW (arXiv:1711.05101) on float32 masters of the model's parameters."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.core.config import OptimizerConfig
from megatron.core.distributed.gradient_buffers import GradientBuffers, main_grad
from megatron.core.optimizer.clip_grads import gradient_norm
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import spec_of


class StepResult(NamedTuple):
    """What one optimizer step did."""

    updated: bool
    """False if the gradients were not finite; then no parameter changed."""
    grad_norm: float
    """Global gradient norm before clipping."""


class MixedPrecisionAdamW:
    """Keeps a float32 master of each bfloat16 parameter; float32 and float64 parameters are their own masters."""

    def __init__(
        self, model: nn.Module, buffers: GradientBuffers, config: OptimizerConfig, groups: ProcessGroups
    ) -> None:
        self.config, self.buffers, self.groups = config, buffers, groups
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._masters: dict[str, Tensor] = {}
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, parameter in self._parameters.items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            master = parameter if wide == parameter.dtype else nn.Parameter(parameter.detach().to(wide))
            self._masters[name] = master
            (decayed if spec_of(parameter).weight_decay else plain).append(master)
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepResult:
        """Clips the finalised gradients and updates, or leaves everything alone if they are not finite."""
        norm = gradient_norm(self._parameters.values(), self.groups)
        if not math.isfinite(norm):
            return StepResult(False, norm)
        if self.config.clip_grad and norm > self.config.clip_grad:
            self.buffers.scale(self.config.clip_grad / (norm + 1e-6))
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        for name, master in self._masters.items():
            master.grad = main_grad(self._parameters[name])
        self._adam.step()
        for name, master in self._masters.items():
            master.grad = None
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)
        return StepResult(True, norm)

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Takes the masters anew from the model's parameters, after weights were loaded into it."""
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                master.copy_(self._parameters[name])

    def state_dict(self) -> dict[str, Any]:
        """Masters, moments and step counts under the parameters' names; tensors are not copied."""
        state: dict[str, Any] = {}
        for name, master in self._masters.items():
            moments = self._adam.state.get(master, {})
            state[name] = {"master": master.detach(), **moments}
        return state

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError, naming parameters, if `state` is not of this model."""
        if state.keys() != self._masters.keys():
            different = sorted(state.keys() ^ self._masters.keys())
            raise ValueError(f"the optimizer state belongs to another model: {different[:5]} differ")
        for name, master in self._masters.items():
            for key, value in state[name].items():
                if key != "step" and value.shape != master.shape:
                    raise ValueError(
                        f"the optimizer's {key} of {name} has shape {tuple(value.shape)}, not {tuple(master.shape)}"
                    )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned and `check_state_dict` accepts."""
        for name, master in self._masters.items():
            saved = dict(state[name])
            master.copy_(saved.pop("master"))
            if saved:
                # the step count too: fused AdamW wants it on the parameter's device
                self._adam.state[master] = {key: value.to(master.device) for key, value in saved.items()}
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)
