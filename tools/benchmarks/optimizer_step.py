"""Time of one optimizer update (norm, clipping, AdamW, weights from masters).

Flat buckets, with masters and moments in float32 and in fewer bits, against torch's update of one tensor each.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_scheduler import StepRates
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import ParameterSpec, Placement, new_parameter
from tools.run_tool import parsed, tool_parser

_EXAMPLE = """example:
  python tools/benchmarks/optimizer_step.py --layers 8 --hidden-size 512 --repeat 15"""


class _Matrices(nn.Module):
    """Parameters in the proportions of a Mixtral: per layer two norms, attention, and eight experts stacked."""

    def __init__(self, layers: int, hidden: int, device: torch.device) -> None:
        super().__init__()
        shapes = [(hidden,), (3 * hidden // 2, hidden), (hidden, hidden), (hidden,), (8, hidden)]
        shapes += [(8, 2 * hidden, hidden), (8, hidden, hidden)]
        self.weights = nn.ParameterList()
        for shape in shapes * layers:
            spec = ParameterSpec(global_shape=shape, weight_decay=len(shape) > 1)
            parameter = new_parameter(spec, Placement(dtype=torch.bfloat16, device=device))
            nn.init.normal_(parameter, std=0.02)
            self.weights.append(parameter)


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "remainders": {"main_params_dtype": "bf16-remainder"},
    **{
        f"{kind} moments": {"main_params_dtype": "bf16-remainder", "exp_avg_dtype": kind, "exp_avg_sq_dtype": kind}
        for kind in ("bf16", "fp16", "fp8")
    },
}
"""What the optimizer keeps: all but the first with masters as remainders."""
PRECISIONS["bf16, gradients too"] = PRECISIONS["bf16 moments"] | {"main_grads_dtype": "bf16"}


def flat_update(model: nn.Module, precision: dict[str, Any]) -> Callable[[], object]:
    """The update of this project."""
    config = OptimizerConfig(use_precision_aware_optimizer=True, **precision)
    buffers = GradientBuffers(model, ProcessGroups(), grads_in_bf16=config.main_grads_dtype == "bf16")
    optimizer = MixedPrecisionOptimizer(buffers, AdamW(config), config, ProcessGroups())
    for bucket in buffers.buckets:
        bucket.grads.normal_()
    return lambda: optimizer.step(StepRates(1e-4, 1e-4, 0.1))


def tensor_update(model: nn.Module, fused: bool) -> Callable[[], object]:
    """torch's own clipping and AdamW on a float32 master of each parameter."""
    parameters = list(model.parameters())
    masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    for master in masters:
        master.grad = torch.randn_like(master)
    adam = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.1, fused=fused)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        adam.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)

    return update


def main(argv: list[str]) -> int:
    """Prints the medians of alternating runs."""
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--layers", type=int, default=8, help="layers (default: 8)")
    parser.add_argument("--hidden-size", type=int, default=512, help="width (default: 512)")
    parser.add_argument("--repeat", type=int, default=15, help="updates of each kind (default: 15)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments = parsed(parser, argv)
    device = torch.device(arguments.device)

    def model() -> _Matrices:
        return _Matrices(arguments.layers, arguments.hidden_size, device)

    updates = {
        **{name: flat_update(model(), precision) for name, precision in PRECISIONS.items()},
        "torch, fused": tensor_update(model(), fused=True),
        "torch, not fused": tensor_update(model(), fused=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(arguments.repeat + 1):
        for name, update in updates.items():
            start = time.perf_counter()
            update()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    count = sum(parameter.numel() for parameter in model().parameters())
    print(f"{count:,} bfloat16 parameters, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {device}")
    ours = statistics.median(seconds["float32"][1:])
    for name, values in seconds.items():
        median = statistics.median(values[1:])
        print(f"{name:20} {1000 * median:8.1f} ms  {median / ours:5.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
