"""Rates of the single operations of an MoE layer: bytes a second, and operations a second of the weight gradient.

On CUDA these are the Triton kernels, elsewhere their PyTorch forms. Bytes are what has to be read and written. Weight
gradients are added by each of the kernels that are there.
"""

import functools
import time
from collections.abc import Callable

import torch

from megatron.core.config import ModelConfig
from megatron.core.fusions.linear import WgradBackend, takes_persistent, wgrad_operation
from megatron.core.fusions.permute import combine, gather, permutation_map
from megatron.core.fusions.router import top_k_routing
from megatron.core.fusions.swiglu import swiglu, swiglu_backward
from tools.benchmarks.turns import spread

_CALLS = 5


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Of a call; on CUDA by the device's own clock and in the mean of several, so that no launch is waited for."""
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    for _ in range(_CALLS):
        action()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / _CALLS


def kernel_table(config: ModelConfig, tokens: int, rounds: int, device: torch.device) -> list[str]:
    """Lines of a table. R = tokens * K rows."""
    hidden, width, experts = config.hidden_size, config.ffn_hidden_size, config.num_experts
    top_k, rows, size = config.moe_router_topk, tokens * config.moe_router_topk, config.dtype.itemsize

    def drawn(*shape: int, dtype: torch.dtype = config.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_()

    logits = drawn(tokens, experts, dtype=torch.float32)
    routing = top_k_routing(logits, top_k)
    index = permutation_map(routing.experts_TK, experts)
    x_TH, y_RH, h_RF, grad_a_RF = drawn(tokens, hidden), drawn(rows, hidden), drawn(rows, 2 * width), drawn(rows, width)
    probs_R = drawn(rows, dtype=torch.float32).sigmoid_()
    main_grad = torch.zeros(experts, hidden, width, dtype=torch.float32, device=device)
    of_tokens, of_rows = tokens * hidden * size, rows * hidden * size
    moving: dict[str, tuple[int, Callable[[], object]]] = {
        "routing": (tokens * (8 * experts + top_k * 12 + 4), lambda: top_k_routing(logits, top_k)),
        "permutation map": (3 * 8 * rows, lambda: permutation_map(routing.experts_TK, experts)),
        "gather": (of_tokens + of_rows, lambda: gather(x_TH, index)),
        "activation": (rows * 3 * width * size, lambda: swiglu(h_RF, probs_R)),
        "activation, backward": (rows * 6 * width * size, lambda: swiglu_backward(grad_a_RF, h_RF, probs_R)),
        "combine": (of_tokens + of_rows, lambda: combine(y_RH, index)),
    }

    def timed(action: Callable[[], object]) -> list[float]:
        seconds(action, device)  # warms up
        return [seconds(action, device) for _ in range(rounds)]

    lines = [f"single operations, {tokens} tokens, {experts} experts"]
    with torch.no_grad():
        for name, (count, action) in moving.items():
            rates = [count / taken / 1e9 for taken in timed(action)]
            lines.append(f"  {name:30}{spread(rates, '.1f'):>26} GB/s")
        flops = 2 * rows * hidden * width
        backends: list[WgradBackend] = ["tiles"]
        if takes_persistent(drawn(experts, hidden, width), main_grad):
            backends.append("persistent")
        for backend in backends:
            operands = (y_RH, grad_a_RF, index.offsets_E, main_grad, 1.0)
            taken = timed(functools.partial(wgrad_operation(backend), *operands))
            rates = [flops / each / 1e9 for each in taken]
            lines.append(f"  {f'weight gradient, {backend}':30}{spread(rates, '.1f'):>26} GFLOP/s")
    return lines
