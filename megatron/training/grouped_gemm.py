"""The choice of what makes the products of the experts, measured when a run begins and kept by those that resume it."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import collectives
from megatron.core.fusions.forms import wants_grouped_mm
from megatron.core.fusions.linear import Backend, ends_for_products, grouped_product
from megatron.core.parallel_state import ProcessGroups
from megatron.core.transformer.moe.experts import Experts
from megatron.core.waiting import to_host, waiting
from megatron.training.config import Arguments
from megatron.training.initialize import on_first, print_once
from megatron.training.setup import Trainer

ADVANTAGE = 0.85
"""The loop must take less than this part of grouped_mm's time: it keeps the host waiting once a layer, which a layer by
itself does not feel as much as a model, where the host would be ahead of the device."""

_CANDIDATES: tuple[Backend, ...] = ("grouped_mm", "loop")

Measure = Callable[[Backend, Experts, int], float]


def rows_per_expert(arguments: Arguments) -> int:
    """Rows that each expert gets of a microbatch if they share evenly."""
    parallel, model = arguments.parallel, arguments.model
    tokens = arguments.training.micro_batch_size * arguments.data.seq_length // parallel.context_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel
    # of the ranks that experts are spread over, tensor-parallel ones have the same tokens, or a part of them each
    microbatches = expert_ranks / parallel.tensor_model_parallel_size
    return max(1, round(tokens * microbatches * model.moe_router_topk / model.num_experts))


def seconds_of_products(backend: Backend, gate_up_EFH: Tensor, down_EHF: Tensor, rows: int, repeat: int = 5) -> float:
    """Seconds of one layer's forward and data-gradient products, `rows` for each expert; the median of `repeat`.

    With the weights [E, 2F, H] and [E, H, F] of that layer. What the loop waits for the device, once to know where each
    expert's rows end, is part of it.
    """
    experts, hidden, width = down_EHF.shape
    ends_E = torch.arange(1, experts + 1, dtype=torch.int32, device=down_EHF.device) * rows
    generator = torch.Generator(down_EHF.device).manual_seed(0)  # the run's own numbers are left alone
    x_RH = torch.empty(experts * rows, hidden, dtype=down_EHF.dtype, device=down_EHF.device)
    a_RF = torch.empty(experts * rows, width, dtype=down_EHF.dtype, device=down_EHF.device)
    for drawn in (x_RH, a_RF):
        drawn.normal_(generator=generator)

    def layer() -> None:
        ends = ends_for_products(x_RH, down_EHF, ends_E, backend)
        h_RF = grouped_product(x_RH, gate_up_EFH, ends, True, backend)
        y_RH = grouped_product(a_RF, down_EHF, ends, True, backend)
        grouped_product(y_RH, down_EHF, ends, False, backend)
        grouped_product(h_RF, gate_up_EFH, ends, False, backend)

    def seconds(layers: int) -> float:
        start = time.perf_counter()
        for _ in range(layers):  # several in a row, to keep the device as busy as in a model
            layer()
        if x_RH.is_cuda:
            with waiting("the device"):
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / layers

    with torch.no_grad():
        seconds(3)  # warms up
        return statistics.median(seconds(3) for _ in range(repeat))


def _measure(backend: Backend, experts: Experts, rows: int) -> float:
    return seconds_of_products(backend, experts.linear_fc1.weight, experts.linear_fc2.weight, rows)


def _slowest(seconds: float, groups: ProcessGroups, device: torch.device) -> float:
    """The longest of all ranks, which is what a step waits for."""
    longest = torch.tensor(seconds, dtype=torch.float64, device=device)
    if groups.world.size > 1:
        collectives.all_reduce(longest, dist.ReduceOp.MAX, group=groups.world.handle)
    return to_host(longest).item()


def resolve_grouped_gemm(trainer: Trainer, known: dict[str, str], measure: Measure = _measure) -> dict[str, str]:
    """Sets the backend of all experts, prints it, and returns it with those `known`, for those who resume; collective.

    There is nothing to choose if a flag says what to use, on a CPU, and where grouped_mm does not take the operands or
    is a loop itself. With --deterministic-mode nothing may depend on a measurement: then it is grouped_mm.
    """
    experts = [module for module in trainer.model.modules() if isinstance(module, Experts)]
    arguments = trainer.arguments
    fixed = arguments.model.moe_grouped_gemm_backend != "auto" or arguments.training.deterministic_mode
    if fixed or not (experts[0].takes_grouped_mm and wants_grouped_mm(experts[0].linear_fc1.weight, "auto")):
        return known
    chosen, line = choose(trainer, known, experts, measure)
    print_once(trainer.groups, line)
    return known | chosen


def choose(
    trainer: Trainer, known: dict[str, str], experts: list[Experts], measure: Measure
) -> tuple[dict[str, str], str]:
    """The same where there is a choice; returns what was chosen, and the line to print."""
    groups, device, rows = trainer.groups, trainer.device, rows_per_expert(trainer.arguments)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    local, hidden, width = experts[0].linear_fc2.weight.shape
    what = f"{local} experts of {rows} rows, {width} x {hidden}, {trainer.arguments.model.params_dtype}, on {name}"
    key, before = on_first(lambda: (what, known.get(what)), groups)
    if before in ("grouped_mm", "loop"):
        backend: Backend = "loop" if before == "loop" else "grouped_mm"
        line = f"products of {key}: {backend}, as measured when the run began"
    else:
        times = {backend: _slowest(measure(backend, experts[0], rows), groups, device) for backend in _CANDIDATES}
        backend = "loop" if times["loop"] < ADVANTAGE * times["grouped_mm"] else "grouped_mm"
        line = f"products of {key}: {backend}, from " + ", ".join(f"{n} {1e3 * t:.3g} ms" for n, t in times.items())
    for module in experts:
        module.backend = backend
    return {key: backend}, line
