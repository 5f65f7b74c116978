"""The MoE layers that moe_layer.py compares, all on the same weights.

T tokens, K experts a token, R = T*K rows, E experts, H hidden, F expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.fusions.linear import takes_persistent
from megatron.core.fusions.weight_gradient import Write
from megatron.core.microbatch import Microbatch
from megatron.core.models.common import parameter_specs
from megatron.core.models.mixtral.weights import layer_rows
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import Placement, specs_of
from megatron.core.transformer.moe.moe_layer import MoELayer

OURS = "this project"


@dataclass(frozen=True)
class Weights:
    """Of one layer; every contestant has its own parameters on this memory."""

    router_EH: Tensor
    gate_up_EFH: Tensor
    """[E, 2F, H], gate then up."""
    down_EHF: Tensor

    @staticmethod
    def drawn(config: ModelConfig, device: torch.device) -> "Weights":
        """Normal numbers, the same on every call."""
        generator = torch.Generator(device).manual_seed(1)
        experts, hidden, width = config.num_experts, config.hidden_size, config.ffn_hidden_size

        def weight(*shape: int) -> Tensor:
            # as large as keeps the size of what goes through
            empty = torch.empty(shape, dtype=config.dtype, device=device)
            return empty.normal_(0, shape[-1] ** -0.5, generator=generator)

        return Weights(weight(experts, hidden), weight(experts, 2 * width, hidden), weight(experts, hidden, width))

    def parameters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Router, gate and up, down."""
        return nn.Parameter(self.router_EH), nn.Parameter(self.gate_up_EFH), nn.Parameter(self.down_EHF)


@dataclass(frozen=True)
class Layer:
    """`forward` maps [T, H] -> [T, H]; gradients of the parameters go to their `grad`, or to a sink of theirs."""

    forward: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]


def _write_into(main_grad: Tensor, write: Write) -> None:
    write(main_grad, 0.0)


def ours(config: ModelConfig, weights: Weights) -> Layer:
    """This project's layer, whose weight gradients go to float32 main gradients as in training."""
    device = weights.router_EH.device
    specs = parameter_specs(layer_rows(config), config.num_experts, ProcessGroups(), sequence_parallel=False)
    placement = Placement(dtype=config.dtype, device=device)
    layer = MoELayer(config, 1, specs_of("decoder.layers.{layer}.mlp", specs), ProcessGroups(), placement)
    router, gate_up, down = weights.parameters()
    layer.router.weight, layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight = router, gate_up, down
    for weight in (gate_up, down):
        main_grad = torch.empty(weight.shape, dtype=torch.float32, device=device)
        weight.gradient_sink = partial(_write_into, main_grad)  # type: ignore[attr-defined]
    return Layer(lambda x_TH: layer(x_TH.unsqueeze(1), Microbatch())[0].squeeze(1), (router, gate_up, down))


def _routed(x_TH: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values, experts_TK = F.linear(x_TH.float(), router.float()).softmax(-1).topk(top_k)
    return values / values.sum(-1, keepdim=True), experts_TK


def loop(config: ModelConfig, weights: Weights) -> Layer:
    """Plain PyTorch, one expert after another, each with its own parameters."""
    router = nn.Parameter(weights.router_EH)
    gate_up = [nn.Parameter(weight) for weight in weights.gate_up_EFH]
    down = [nn.Parameter(weight) for weight in weights.down_EHF]

    def forward(x_TH: Tensor) -> Tensor:
        probs_TK, experts_TK = _routed(x_TH, router, config.moe_router_topk)
        y_TH = torch.zeros_like(x_TH)
        for expert in range(config.num_experts):
            token, choice = torch.where(experts_TK == expert)
            gate, up = F.linear(x_TH[token], gate_up[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, down[expert])
            y_TH.index_add_(0, token, (rows * probs_TK[token, choice, None]).to(x_TH.dtype))
        return y_TH

    return Layer(forward, (router, *gate_up, *down))


def grouped(config: ModelConfig, weights: Weights) -> Layer:
    """Plain PyTorch with torch's grouped_mm, differentiated by autograd."""
    router, gate_up, down = weights.parameters()
    numbers_E = torch.arange(config.num_experts, device=router.device)
    product: Callable[..., Tensor] = F.grouped_mm

    def forward(x_TH: Tensor) -> Tensor:
        top_k = config.moe_router_topk
        probs_TK, experts_TK = _routed(x_TH, router, top_k)
        ordered_R, pairs_R = experts_TK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(ordered_R, numbers_E, right=True).to(torch.int32)
        gate, up = product(x_TH[pairs_R // top_k], gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        rows_RH = product(F.silu(gate) * up, down.transpose(1, 2), offs=ends_E)
        rows_RH = (rows_RH * probs_TK.flatten()[pairs_R, None]).to(x_TH.dtype)
        return torch.zeros_like(x_TH).index_add_(0, pairs_R // top_k, rows_RH)

    return Layer(forward, (router, gate_up, down))


def transformers_layer(config: ModelConfig, weights: Weights, implementation: str) -> Layer:
    """transformers' MixtralSparseMoeBlock."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    theirs: Any = MixtralConfig(
        hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
        num_local_experts=config.num_experts, num_experts_per_tok=config.moe_router_topk,
    )  # fmt: skip
    theirs._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(theirs)
    if not hasattr(block.experts, "gate_up_proj"):
        raise ImportError("it needs transformers 5, whose experts are stacked")
    router, gate_up, down = weights.parameters()
    block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj = router, gate_up, down
    return Layer(lambda x_TH: block(x_TH.unsqueeze(0)).squeeze(0), (router, gate_up, down))


def contestants(config: ModelConfig, device: torch.device) -> tuple[dict[str, Layer], dict[str, str]]:
    """Name -> layer of those there are, name -> reason of those that are absent."""
    weights = Weights.drawn(config, device)
    found = {
        f"{OURS}, grouped_mm": ours(replace(config, moe_grouped_gemm_backend="grouped_mm"), weights),
        f"{OURS}, loop": ours(replace(config, moe_grouped_gemm_backend="loop"), weights),
        "loop of products": loop(config, weights),
        "torch grouped_mm": grouped(config, weights),
    }
    absent = {}
    in_float32 = [weight[:1].float() for weight in (weights.gate_up_EFH, weights.down_EHF)]
    if all(map(takes_persistent, (weights.gate_up_EFH, weights.down_EHF), in_float32)):
        persistent = replace(config, moe_grouped_gemm_backend="grouped_mm", moe_grouped_wgrad_backend="persistent")
        found[f"{OURS}, persistent"] = ours(persistent, weights)
    else:
        absent[f"{OURS}, persistent"] = "its weight gradients want an H100 or B200 with Triton, and 16 bits"
    for implementation in ("grouped_mm", "eager"):
        name = f"transformers, {implementation}"
        try:
            found[name] = transformers_layer(config, weights, implementation)
        except ImportError as error:
            absent[name] = str(error)
    return found, absent
