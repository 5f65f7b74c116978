"""The choice of what makes the products of the experts, and what their weight gradients.

Both are measured when a run begins, and kept by those that resume it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core.distributed.gradient_buffers import main_grad
from megatron.core.fusions.forms import wants_grouped_mm
from megatron.core.fusions.linear import (
    Backend,
    WgradBackend,
    ends_for_products,
    grouped_product,
    takes_persistent,
    wgrad_operation,
)
from megatron.core.transformer.moe.experts import Experts
from megatron.core.waiting import waiting
from megatron.training.config import Arguments
from megatron.training.initialize import largest, on_first, print_once, together
from megatron.training.setup import Trainer

Measure = Callable[[Any, Experts, int], float]
"""Seconds that a backend takes for the experts of a layer, with so many rows for each."""


class Choice(NamedTuple):
    """Two backends of which the second is taken where it is clearly faster."""

    what: str
    attribute: str
    """Of the experts."""
    backends: tuple[str, str]
    advantage: float
    """The second must take less than this part of the first's time."""
    measure: Measure


def rows_per_expert(arguments: Arguments) -> int:
    """Rows that each expert gets of a microbatch if they share evenly."""
    parallel, model = arguments.parallel, arguments.model
    tokens = arguments.training.micro_batch_size * arguments.data.seq_length // parallel.context_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel
    # of the ranks that experts are spread over, tensor-parallel ones have the same tokens, or a part of them each
    microbatches = expert_ranks / parallel.tensor_model_parallel_size
    return max(1, round(tokens * microbatches * model.moe_router_topk / model.num_experts))


def _drawn(rows: int, width: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(0)  # the run's own numbers are left alone
    return torch.empty(rows, width, dtype=like.dtype, device=like.device).normal_(generator=generator)


def _even_ends(weight_EOI: Tensor, rows: int) -> Tensor:
    return torch.arange(1, weight_EOI.shape[0] + 1, dtype=torch.int32, device=weight_EOI.device) * rows


def _median_seconds(layer: Callable[[], None], device: torch.device, repeat: int) -> float:
    def seconds(layers: int) -> float:
        start = time.perf_counter()
        for _ in range(layers):  # several in a row, to keep the device as busy as in a model
            layer()
        if device.type == "cuda":
            with waiting("the device"):
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / layers

    with torch.no_grad():
        seconds(3)  # warms up
        return statistics.median(seconds(3) for _ in range(repeat))


def seconds_of_products(backend: Backend, gate_up_EFH: Tensor, down_EHF: Tensor, rows: int, repeat: int = 5) -> float:
    """Seconds of one layer's forward and data-gradient products, `rows` for each expert; the median of `repeat`.

    With the weights [E, 2F, H] and [E, H, F] of that layer. What the loop waits for the device, once to know where each
    expert's rows end, is part of it.
    """
    experts, hidden, width = down_EHF.shape
    ends_E = _even_ends(down_EHF, rows)
    x_RH, a_RF = _drawn(experts * rows, hidden, down_EHF), _drawn(experts * rows, width, down_EHF)

    def layer() -> None:
        ends = ends_for_products(x_RH, down_EHF, ends_E, backend)
        h_RF = grouped_product(x_RH, gate_up_EFH, ends, True, backend)
        y_RH = grouped_product(a_RF, down_EHF, ends, True, backend)
        grouped_product(y_RH, down_EHF, ends, False, backend)
        grouped_product(h_RF, gate_up_EFH, ends, False, backend)

    return _median_seconds(layer, x_RH.device, repeat)


def seconds_of_weight_gradients(
    backend: WgradBackend, weights_EOI: Sequence[Tensor], main_grads_EOI: Sequence[Tensor], rows: int, repeat: int = 5
) -> float:
    """Seconds to add the gradients of one layer's weights to its main gradients, whose contents are lost.

    `rows` for each expert; the median of `repeat`.
    """
    ends_E, add_ = _even_ends(weights_EOI[0], rows), wgrad_operation(backend)
    operands = [[_drawn(weight.shape[0] * rows, width, weight) for width in weight.shape[1:]] for weight in weights_EOI]

    def layer(beta: float = 1.0) -> None:
        for (grad_RO, x_RI), out_EOI in zip(operands, main_grads_EOI, strict=True):
            add_(grad_RO, x_RI, ends_E, out_EOI, beta)

    layer(0.0)  # so that the first microbatch's kernel is compiled as well, and no NaN is added to
    return _median_seconds(layer, ends_E.device, repeat)


def _weights(experts: Experts) -> tuple[Tensor, Tensor]:
    return experts.linear_fc1.weight, experts.linear_fc2.weight


def _measure_products(backend: Backend, experts: Experts, rows: int) -> float:
    return seconds_of_products(backend, *_weights(experts), rows)


def _measure_gradients(backend: WgradBackend, experts: Experts, rows: int) -> float:
    # before a run's first step its main gradients hold nothing, and the first microbatch replaces what they hold
    weights = _weights(experts)
    return seconds_of_weight_gradients(backend, weights, [main_grad(weight) for weight in weights], rows)


# The loop keeps the host waiting once a layer, which a layer by itself does not feel as much as a model, where the host
# would be ahead of the device.
PRODUCTS = Choice("products", "backend", ("grouped_mm", "loop"), 0.85, _measure_products)
# Where messages of other ranks keep 16 of 132 multiprocessors busy, which a measurement does not feel, the programs of
# eight experts come in 10 rounds instead of 8, while tiles take 132/116 of their time: 1.1 times as much.
WEIGHT_GRADIENTS = Choice("weight gradients", "wgrad_backend", ("tiles", "persistent"), 0.9, _measure_gradients)


def _has_persistent(experts: Experts, asked: bool) -> bool:
    """Whether both gradients have that kernel; raises ValueError if it is asked for and they do not."""
    weights = _weights(experts)
    if all(takes_persistent(weight, main_grad(weight)) for weight in weights):
        return True
    if asked:
        down = weights[1]
        raise ValueError(
            f"--moe-grouped-wgrad-backend persistent does not take experts of {down.shape[2]} x {down.shape[1]} in "
            f"{down.dtype} with gradients in {main_grad(down).dtype} on {_name(down.device)}: it wants an H100 or B200 "
            "with Triton, 16 bits, gradients in float32 and widths that are multiples of 8, so leave it at auto"
        )
    return False


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_grouped_gemm(
    trainer: Trainer, known: dict[str, str], choices: Sequence[Choice] | None = None
) -> dict[str, str]:
    """Sets the backends of all experts, prints them, and returns them with those `known`, for those who resume.

    Collective.

    There is nothing to choose if a flag says what to use, on a CPU, where grouped_mm does not take the operands or is a
    loop itself, and where some rank has one kernel alone for the weight gradients. With --deterministic-mode nothing
    may depend on a measurement: then it is grouped_mm, and tiles. Raises SharedError if a flag asks for what a rank
    does not have.
    """
    experts = [module for module in trainer.model.modules() if isinstance(module, Experts)]
    model, groups, first = trainer.arguments.model, trainer.groups, experts[0]
    asked = model.moe_grouped_wgrad_backend
    has_persistent = together(lambda: _has_persistent(first, asked == "persistent"), groups)
    there_are_two = (
        model.moe_grouped_gemm_backend == "auto"
        and first.takes_grouped_mm
        and wants_grouped_mm(first.linear_fc1.weight, "auto"),
        asked == "auto" and has_persistent,
    )
    if trainer.arguments.training.deterministic_mode:
        return known
    missing = largest(tuple(float(not two) for two in there_are_two), groups)
    for choice, ranks_without in zip(choices or (PRODUCTS, WEIGHT_GRADIENTS), missing, strict=True):
        if not ranks_without:
            chosen, line = choose(trainer, known, experts, choice)
            known = known | chosen
            print_once(groups, line)
    return known


def choose(
    trainer: Trainer, known: dict[str, str], experts: list[Experts], choice: Choice
) -> tuple[dict[str, str], str]:
    """The same for one choice where there is one; returns what was chosen, and the line to print."""
    groups, device, rows = trainer.groups, trainer.device, rows_per_expert(trainer.arguments)
    local, hidden, width = experts[0].linear_fc2.weight.shape
    shape = f"{local} experts of {rows} rows, {width} x {hidden}, {trainer.arguments.model.params_dtype}"
    what = f"{shape}, on {_name(device)}"
    # checkpoints name products by nothing but their shape
    key = what if choice.attribute == PRODUCTS.attribute else f"{choice.what} of {what}"
    key, before = on_first(lambda: (key, known.get(key)), groups)
    first, second = choice.backends
    if before in choice.backends:
        backend = before
        said = "as measured when the run began"
    else:
        # of the slowest rank, which is what a step waits for
        times = {each: largest((choice.measure(each, experts[0], rows),), groups)[0] for each in choice.backends}
        backend = second if times[second] < choice.advantage * times[first] else first
        said = "from " + ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())
    for module in experts:
        setattr(module, choice.attribute, backend)
    return {key: backend}, f"{choice.what} of {key.removeprefix(f'{choice.what} of ')}: {backend}, {said}"
