"""Speed and memory of the MoE layer alone (router, experts and all between), against other ways to compute it.

Compared with this project's: a loop of products and torch's grouped_mm, both differentiated by autograd, and
transformers' block. All have the same weights and input and take their turns in one run. Ours adds weight gradients to
float32 main gradients, as in training; the others leave them in the type of the weights, which is less to write.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron.core.config import ModelConfig
from megatron.core.models.flops import weights_of_a_token
from megatron.core.models.mixtral.weights import layer_rows
from tools.benchmarks.machine import machine
from tools.benchmarks.moe_contestants import OURS, Layer, contestants
from tools.benchmarks.moe_kernels import kernel_table, seconds
from tools.benchmarks.turns import ratios, spread
from tools.run_tool import parsed, positive, run_tool, tool_parser

_EXAMPLE = """examples:
  python tools/benchmarks/moe_layer.py                  # Mixtral 8x7B in bfloat16 on a GPU, a small layer on a CPU
  python tools/benchmarks/moe_layer.py --tokens 8192 --experts 8 --rounds 50
  python tools/benchmarks/moe_layer.py --device cpu --dtype bfloat16 --hidden-size 256 --ffn-hidden-size 896"""

WARM_UP_ROUNDS = 3
DEFAULTS = {
    "cuda": {"dtype": "bfloat16", "hidden_size": 4096, "ffn_hidden_size": 14336, "tokens": [4096, 8192, 16384]},
    "cpu": {"dtype": "float32", "hidden_size": 512, "ffn_hidden_size": 1792, "tokens": [256, 512, 1024]},
}
# routers differ in a few choices of bfloat16, and then a token's whole output does
BOUNDS = {"float32": 1e-5, "bfloat16": 0.1}


def layer_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of a forward pass: of the router and the chosen experts; backward has twice as many."""
    return 2 * tokens * weights_of_a_token(config, (row for row in layer_rows(config) if ".mlp." in row.name))


def saved_bytes(layer: Layer, x_TH: Tensor) -> int:
    """What the layer keeps between forward and backward apart from its weights; memory that is shared counts once."""
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_TH = layer.forward(x_TH)  # alive until all are counted, so that no address is used twice
    total = sum(kept.values())
    del y_TH
    return total


class Measured:
    """What the rounds found of one contestant."""

    def __init__(self, layer: Layer, x_TH: Tensor, grad_TH: Tensor) -> None:
        self._layer, self._x_TH, self._grad_TH = layer, x_TH, grad_TH
        self.forward: list[float] = []
        self.both: list[float] = []
        self.peak_bytes = 0

    def _forward_and_backward(self) -> None:
        for parameter in self._layer.parameters:
            parameter.grad = None
        self._x_TH.grad = None
        self._layer.forward(self._x_TH).backward(self._grad_TH)

    def round(self, counts: bool) -> None:
        """Takes each measurement once; memory on top of what was allocated before."""
        cuda = self._x_TH.is_cuda
        forward = seconds(lambda: self._layer.forward(self._x_TH), self._x_TH.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        both = seconds(self._forward_and_backward, self._x_TH.device)
        if cuda:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before)
        for parameter in self._layer.parameters:
            parameter.grad = None
        if counts:
            self.forward.append(forward)
            self.both.append(both)


def check_equal(layers: dict[str, Layer], x_TH: Tensor, bound: float) -> None:
    """Raises ValueError if the layers do not compute the same: ||y - ours|| / ||ours|| above `bound`."""
    with torch.no_grad():
        expected = next(iter(layers.values())).forward(x_TH).double()
        for name, layer in layers.items():
            error = ((layer.forward(x_TH).double() - expected).norm() / expected.norm()).item()
            if not error <= bound:
                raise ValueError(f"{name} computes something else: relative difference {error:.1e}")


def print_table(measured: dict[str, Measured], saved: dict[str, int], flops: int, cuda: bool) -> None:
    """A line a contestant."""
    mine = [name for name in measured if name.startswith(OURS)]
    best = min(mine, key=lambda name: statistics.median(measured[name].both))
    scale, unit = (1e12, "TFLOP/s") if cuda else (1e9, "GFLOP/s")
    heads = (f"forward {unit}", "forward+backward", "time / best of ours", "kept GB", "peak GB")
    print(f"{'':25}{heads[0]:>24}{heads[1]:>24}{heads[2]:>22}{heads[3]:>9}{heads[4]:>9}")
    for name, result in measured.items():
        forward = [flops / taken / scale for taken in result.forward]
        both = [3 * flops / taken / scale for taken in result.both]
        peak = f"{result.peak_bytes / 1e9:9.3f}" if cuda else f"{'-':>9}"
        print(
            f"{name:25}{spread(forward, '.1f'):>24}{spread(both, '.1f'):>24}"
            f"{spread(ratios(result.both, measured[best].both), '.2f'):>22}{saved[name] / 1e9:9.3f}{peak}"
        )


def measure(config: ModelConfig, token_counts: list[int], rounds: int, device: torch.device) -> None:
    """Prints the tables of one number of experts."""
    layers, absent = contestants(config, device)
    for tokens in token_counts:
        generator = torch.Generator(device).manual_seed(2)
        shape = (tokens, config.hidden_size)
        x_TH = torch.randn(shape, dtype=config.dtype, device=device, generator=generator).requires_grad_()
        grad_TH = torch.randn(shape, dtype=config.dtype, device=device, generator=generator)
        check_equal(layers, x_TH, BOUNDS[config.params_dtype])
        saved = {name: saved_bytes(layer, x_TH) for name, layer in layers.items()}
        measured = {name: Measured(layer, x_TH, grad_TH) for name, layer in layers.items()}
        order = list(measured)
        for number in range(-WARM_UP_ROUNDS, rounds):
            first = number % len(order)
            for name in order[first:] + order[:first]:
                measured[name].round(counts=number >= 0)
        print(f"\n{config.num_experts} experts, top {config.moe_router_topk}, {tokens} tokens")
        print_table(measured, saved, layer_flops(config, tokens), x_TH.is_cuda)
    for name, reason in absent.items():
        print(f"absent: {name} ({reason})")
    print()
    print("\n".join(kernel_table(config, token_counts[-1], rounds, device)))


def compare(args: argparse.Namespace) -> None:
    """Measures and prints."""
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    device = torch.device(kind)
    for name, value in DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    gpu = torch.cuda.get_device_name() if kind == "cuda" else None
    print(machine(("torch", "transformers", "triton"), gpu))
    print(
        f"hidden {args.hidden_size}, expert width {args.ffn_hidden_size}, {args.dtype}, {torch.get_num_threads()} "
        f"threads; median (lowest to highest) of {args.rounds} rounds, all in turns; ratios by round"
    )
    for experts in args.experts:
        config = ModelConfig(
            num_layers=1, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size, num_attention_heads=1,
            num_experts=experts, moe_router_topk=args.top_k, params_dtype=args.dtype,
        )  # fmt: skip
        measure(config, args.tokens, args.rounds, device)


def main(argv: list[str]) -> int:
    """Prints the tables."""
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, if not given")
    parser.add_argument("--dtype", choices=tuple(BOUNDS), help="bfloat16 on a GPU, float32 on a CPU, if not given")
    parser.add_argument("--hidden-size", type=positive, help="4096 on a GPU, 512 on a CPU, if not given")
    parser.add_argument("--ffn-hidden-size", type=positive, help="14336 on a GPU, 1792 on a CPU, if not given")
    parser.add_argument("--tokens", type=positive, nargs="+", help="4096 8192 16384 on a GPU, 256 512 1024 on a CPU")
    parser.add_argument("--experts", type=positive, nargs="+", default=[8, 4], help="default: 8 4")
    parser.add_argument("--top-k", type=positive, default=2, help="experts a token (default: 2)")
    parser.add_argument("--rounds", type=positive, default=10, help="measurements that count (default: 10)")
    args = parsed(parser, argv)
    return run_tool(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
