"""Time of one training step (forward, backward, AdamW) against transformers' and against the floor of the machine.

The floor is the time that the matrix products alone take at the rate torch.matmul reaches on products of their shapes,
plus the time that the optimizer's bytes take at the measured copy rate.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron.core.config import ModelConfig
from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.models.mixtral.flops import training_flops_per_token
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.optimizer.optimizer import MixedPrecisionAdamW
from megatron.core.optimizer.param_scheduler import StepRates
from megatron.core.optimizer_config import OptimizerConfig
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import initialize_parameters
from tools.benchmarks.machine import machine

_EXAMPLE = """examples:
  python tools/benchmarks/train_step.py
  python tools/benchmarks/train_step.py --device cuda --dtype bfloat16 --hidden-size 4096 --ffn-hidden-size 14336 \\
      --num-attention-heads 32 --num-query-groups 8 --num-layers 2 --seq-length 4096"""

Step = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def our_step(config: ModelConfig, tokens: Tensor) -> Step:
    """The step of this project, without the loop's logging."""
    model = MixtralModel(config, groups=ProcessGroups(), sequence_parallel=False, device=tokens.device)
    initialize_parameters(model, 0, 1)
    buffers = GradientBuffers(model, ProcessGroups())
    optimizer = MixedPrecisionAdamW(buffers, OptimizerConfig(), ProcessGroups())

    def step() -> None:
        buffers.start_step(1)
        model(tokens, labels=tokens).tensor.mean().backward()
        buffers.finalize()
        optimizer.step(StepRates(1e-4, 1e-4, 0.1))

    return step


def transformers_step(config: ModelConfig, tokens: Tensor, implementation: str) -> Step:
    """transformers' model and a fused AdamW on its parameters, with float32 masters for narrow ones."""
    from transformers import MixtralConfig, MixtralForCausalLM

    assert config.vocab_size is not None
    options: dict[str, Any] = {"experts_implementation": implementation}
    model: torch.nn.Module = MixtralForCausalLM(
        MixtralConfig(
            num_hidden_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.query_groups,
            vocab_size=config.vocab_size,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.moe_router_topk,
            **options,
        )
    )
    model = model.to(tokens.device, config.dtype)
    parameters = list(model.parameters())
    masters = [p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in parameters]
    adam = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        for parameter, master in zip(parameters, masters, strict=True):
            if master is not parameter:
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    return step


def seconds(action: Step, device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def floor_parts(config: ModelConfig, tokens: Tensor) -> tuple[Step, float, Step, float]:
    """A product and a copy to be timed, and how many of each a step amounts to."""
    rows = tokens.numel() * config.moe_router_topk // config.num_experts
    a = torch.randn(rows, config.hidden_size, device=tokens.device).to(config.dtype)
    b = torch.randn(config.hidden_size, 2 * config.ffn_hidden_size, device=tokens.device).to(config.dtype)
    out = torch.empty(rows, 2 * config.ffn_hidden_size, device=tokens.device, dtype=config.dtype)
    flops = training_flops_per_token(config, tokens.shape[1]) * tokens.numel()
    products = flops / (2 * rows * config.hidden_size * 2 * config.ffn_hidden_size)
    parameters = sum(
        p.numel()
        for p in MixtralModel(
            config, groups=ProcessGroups(), sequence_parallel=False, device=torch.device("meta")
        ).parameters()
    )
    # gradient read; master and two moments read and written; a narrow weight written
    optimizer_bytes = parameters * (4 + 24 + (0 if config.dtype == torch.float32 else 2))
    source = torch.ones(2**26, device=tokens.device)
    target = torch.empty_like(source)
    copies = optimizer_bytes / (2 * source.nbytes)
    return lambda: torch.mm(a, b, out=out), products, lambda: target.copy_(source), copies


def main(argv: list[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    parser.add_argument("--rounds", type=int, default=7, help="steps of each contestant, taken in turns")
    sizes = {"num-layers": 4, "hidden-size": 512, "ffn-hidden-size": 1792, "num-attention-heads": 8}
    sizes |= {"num-query-groups": 2, "num-experts": 8, "vocab-size": 32000, "seq-length": 512, "micro-batch-size": 2}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)
    shape = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in list(sizes)[:7]}
    config = ModelConfig(**shape, params_dtype=args.dtype)
    device = torch.device(args.device)
    tokens = torch.randint(config.vocab_size or 0, (args.micro_batch_size, args.seq_length), device=device)

    product, products, copy, copies = floor_parts(config, tokens)
    contestants: dict[str, Step] = {
        "this project": our_step(config, tokens),
        "transformers, grouped_mm": transformers_step(config, tokens, "grouped_mm"),
        "transformers, eager": transformers_step(config, tokens, "eager"),
        "a product": product,
        "a copy": copy,
    }
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    print(f"{machine(('torch', 'transformers'), gpu)}; {torch.get_num_threads()} threads; absent: Megatron-Core")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(args.rounds + 2):
        for name, action in contestants.items():
            taken = [seconds(action, device) for _ in range(1 if "," in name or name == "this project" else 5)]
            if round_number >= 2:  # the first two warm up
                times[name].append(statistics.median(taken))
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor = medians["a product"] * products + medians["a copy"] * copies
    flops = training_flops_per_token(config, args.seq_length) * tokens.numel()
    ours = medians["this project"]
    for name in list(contestants)[:3]:
        low, high = min(times[name]), max(times[name])
        print(
            f"{name:26} {medians[name]:7.3f} s ({low:.3f} to {high:.3f})  {flops / medians[name] / 1e9:8.1f} GFLOP/s  "
            f"{medians[name] / ours:5.2f}x ours  {floor / medians[name]:5.2f} of the floor's speed"
        )
    print(
        f"{'floor':26} {floor:7.3f} s: products {medians['a product'] * products:.3f} s, optimizer's bytes "
        f"{medians['a copy'] * copies:.3f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
