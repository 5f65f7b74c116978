"""Time of one training step (forward, backward, clipping, AdamW) against peers' and against the floor of the machine.

Every contestant runs in its own process; they take turns of two steps, of which the second counts, since in
training a step follows another one. With each round the floor is timed again. The floor is the sum over all matrix
products of a step, each at the rate torch.matmul reaches on its shape, plus the optimizer's bytes at the measured copy
rate. The stricter floor takes all products at the highest of these rates.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron.core.config import ModelConfig
from megatron.core.models.flops import training_flops_per_token
from megatron.core.models.mixtral.weights import mixtral_table
from tools.benchmarks.contestants import OURS, StepShape
from tools.benchmarks.floor import Floor
from tools.benchmarks.machine import machine
from tools.benchmarks.turns import ContestantFailed, ContestantProcess, ratios, spread
from tools.run_tool import parsed, positive, run_tool, tool_parser

_EXAMPLE = """examples:
  python tools/benchmarks/train_step.py
  python tools/benchmarks/train_step.py --dtype bfloat16 --profile
  python tools/benchmarks/train_step.py --megatron-core /folder/of/pip-install-target
  layers of 8x7B on one GPU of 80 GB (1.7e9 parameters, about 31 GB before activations), one contestant after another:
  python tools/benchmarks/train_step.py --device cuda --dtype bfloat16 --num-layers 1 --hidden-size 4096 \\
      --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8 --seq-length 4096 --micro-batch-size 2 \\
      --rounds 20 --one-by-one"""

WARM_UP_ROUNDS = 2
SIZES = {
    "num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 1792, "num_attention_heads": 8, "num_query_groups": 2,
    "num_experts": 8, "moe_router_topk": 2, "vocab_size": 32000, "seq_length": 512, "micro_batch_size": 2,
}  # fmt: skip


def installed_megatron_core() -> str | None:
    """The folder on whose path PyPI's megatron-core lies, if it is installed."""
    try:
        return str(importlib.metadata.distribution("megatron-core").locate_file(""))
    except importlib.metadata.PackageNotFoundError:
        return None


def find_peers(megatron_core: str | None) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Name -> (kind, argument) of the contestants there are, and name -> reason of those that are absent."""
    found, absent = {OURS: ("ours", "")}, {}
    implementations = {"transformers, grouped_mm": "grouped_mm", "transformers, eager": "eager"}
    for name, implementation in implementations.items():
        if importlib.util.find_spec("transformers") is None:
            absent[name] = "not installed"
        else:
            found[name] = ("transformers", implementation)
    if megatron_core is not None and not Path(megatron_core, "megatron", "core", "package_info.py").exists():
        raise ValueError(f"--megatron-core {megatron_core}: there is no Megatron-Core (megatron/core) in that folder")
    folder = megatron_core or installed_megatron_core()
    if folder is None:
        absent["Megatron-Core"] = "not installed; give its folder with --megatron-core"
    else:
        found["Megatron-Core" + _version(folder)] = ("megatron-core", folder)
    return found, absent


def _version(folder: str) -> str:
    versions = [d.version for d in importlib.metadata.distributions(path=[folder]) if d.name == "megatron-core"]
    return f" {versions[0]}" if versions else ""


class Comparison:
    """What the rounds measured."""

    def __init__(self, shape: StepShape, rounds: int) -> None:
        self.shape, self.rounds = shape, rounds
        self.seconds: dict[str, list[float]] = {}
        self.losses: dict[str, tuple[float, float]] = {}
        self.peak_bytes: dict[str, float] = {}
        self.parameters: dict[str, int] = {}
        self.threads: dict[str, int] = {}
        self.products: dict[str, list[list[float]]] = {}
        """By contestant, next to whose steps they were timed: seconds of each product, a list a round."""
        self.copies: dict[str, list[float]] = {}
        self.absent: dict[str, str] = {}
        self.profile: dict[str, float] | None = None

    def run(self, entries: dict[str, tuple[str, str]], floor: Floor | None, wants_profile: bool) -> Floor | None:
        """Lets these contestants take steps in turns. Returns the floor, made when the parameters are known."""
        with contextlib.ExitStack() as stack:
            contestants: dict[str, ContestantProcess] = {}
            for name, (kind, argument) in entries.items():
                try:
                    contestants[name] = ContestantProcess(kind, argument, self.shape)
                    stack.callback(contestants[name].close)
                    self.parameters[name] = contestants[name].parameters
                    self.threads[name] = contestants[name].threads
                except ContestantFailed as failure:
                    self._gone(name, failure)
            if floor is None and contestants:
                floor = Floor(self.shape, next(iter(self.parameters.values())))
            for number in range(-WARM_UP_ROUNDS, self.rounds):
                self._round(number, contestants, floor)
                print(f"round {number + 1} of {self.rounds}" if number >= 0 else "warming up", file=sys.stderr)
            if wants_profile and OURS in contestants:
                self.profile = contestants[OURS].ask("profile")
        return floor

    def _round(self, number: int, contestants: dict[str, ContestantProcess], floor: Floor | None) -> None:
        order = list(contestants)
        first = number % len(order) if order else 0
        for name in order[first:] + order[:first]:  # no contestant always runs after the same one
            try:
                contestants[name].ask("step")
                answer = contestants[name].ask("step")
            except ContestantFailed as failure:
                contestants.pop(name).close()
                self.seconds.pop(name, None)
                self._gone(name, failure)
                continue
            self.losses[name] = (self.losses.get(name, (answer["loss"], 0.0))[0], answer["loss"])
            self.peak_bytes[name] = answer["peak_bytes"]
            if number >= 0:
                self.seconds.setdefault(name, []).append(answer["seconds"])
        if floor is None:
            return
        products, copy = floor.seconds_of_products(), floor.seconds_of_optimizer()
        if number >= 0:
            for name in contestants:
                self.products.setdefault(name, []).append(products)
                self.copies.setdefault(name, []).append(copy)

    def _gone(self, name: str, failure: ContestantFailed) -> None:
        if name == OURS:
            raise ValueError(f"this project's step failed: {failure}")
        self.absent[name] = f"failed: {failure}"

    def floors(self, name: str, floor: Floor) -> tuple[list[float], list[float]]:
        """Seconds of the floor and of the stricter one in each round that the contestant took part in."""
        measured, strict = [], []
        medians = [statistics.median(times) for times in zip(*self.products[name], strict=True)]
        best = max(range(len(medians)), key=lambda i: floor.products[i].flops / medians[i])
        for times, copy in zip(self.products[name], self.copies[name], strict=True):
            measured.append(copy + sum(p.count * t for p, t in zip(floor.products, times, strict=True)))
            strict.append(copy + floor.flops / (floor.products[best].flops / times[best]))
        return measured, strict


def print_table(found: Comparison, floor: Floor, flops: float) -> None:
    """One line a contestant, then the floors."""
    ours = found.seconds[OURS]
    print(
        f"\n{'':25}{'seconds a step':>25}{'GFLOP/s':>9}{'time / ours':>22}{'floor / time':>22}{'stricter floor':>22}"
        f"{'peak GB':>9}{'loss':>17}"
    )
    for name, seconds in found.seconds.items():
        measured, strict = found.floors(name, floor)
        first, last = found.losses[name]
        print(
            f"{name:25}{spread(seconds, '.3f'):>25}{flops / statistics.median(seconds) / 1e9:9.1f}"
            f"{spread(ratios(seconds, ours), '.2f'):>22}{spread(ratios(measured, seconds), '.2f'):>22}"
            f"{spread(ratios(strict, seconds), '.2f'):>22}{found.peak_bytes[name] / 1e9:9.2f}"
            f"{f'{first:.2f} to {last:.2f}':>17}"
        )
    measured, strict = found.floors(OURS, floor)
    copy = statistics.median(found.copies[OURS])
    rates = _rates(found, floor)
    print(f"{'floor':25}{spread(measured, '.3f'):>25}   each product at its own rate, optimizer's bytes {copy:.3f} s")
    best = max(rates, key=lambda name: rates[name])
    print(f"{'stricter floor':25}{spread(strict, '.3f'):>25}   all at {rates[best] / 1e9:.1f} GFLOP/s ({best})")
    for name, reason in found.absent.items():
        print(f"absent: {name} ({reason})")


def _rates(found: Comparison, floor: Floor) -> dict[str, float]:
    """Median rate of each product, in operations a second."""
    times = zip(*found.products[OURS], strict=True)
    return {p.name: p.flops / statistics.median(t) for p, t in zip(floor.products, times, strict=True)}


def print_profile(found: Comparison, floor: Floor) -> None:
    """Where our step's time goes, and what the floor is made of."""
    if found.profile is None:
        return
    total = sum(found.profile.values())
    print(f"\nthis project's step under the profiler, {total:.3f} s, the mean of 3:")
    for name, seconds in found.profile.items():
        print(f"  {name:32}{seconds:8.3f} s {100 * seconds / total:5.1f} %")
    print("\nproducts of the floor:")
    for product, rate in zip(floor.products, _rates(found, floor).values(), strict=True):
        seconds = product.count * product.flops / rate
        print(f"  {product.name:34}{product.count:8.2f} x {1e3 * product.flops / rate:9.3f} ms "
              f"= {seconds:7.4f} s {rate / 1e9:9.1f} GFLOP/s")  # fmt: skip


def compare(args: argparse.Namespace) -> None:
    """Measures and prints."""
    sizes = {name: getattr(args, name) for name in SIZES}
    model = {name: value for name, value in sizes.items() if name not in ("seq_length", "micro_batch_size")}
    config = ModelConfig(**model, params_dtype=args.dtype)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    sizes["vocab_size"] = config.padded_vocab_size(1)
    shape = StepShape(**sizes, params_dtype=args.dtype, device=args.device)
    entries, absent = find_peers(args.megatron_core)
    found = Comparison(shape, args.rounds)
    groups = [{name: entry} for name, entry in entries.items()] if args.one_by_one else [entries]
    floor: Floor | None = None
    for group in groups:
        floor = found.run(group, floor, args.profile)
    assert floor is not None
    found.absent = absent | found.absent
    counts = {name: count for name, count in found.parameters.items() if count != found.parameters[OURS]}
    if counts:
        raise ValueError(f"the models differ: {found.parameters[OURS]:,} parameters here, {counts} there")
    tokens = args.micro_batch_size * args.seq_length
    flops = tokens * training_flops_per_token(config, mixtral_table(config), args.seq_length)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    print(machine(("torch", "transformers"), gpu))
    taken = "one contestant after another" if args.one_by_one else "all in turns"
    print(
        f"{found.parameters[OURS]:,} parameters, {args.dtype}, {args.micro_batch_size} x {args.seq_length} tokens, "
        f"{flops / 1e9:.1f} GFLOP a step; {found.threads[OURS]} threads; median (lowest to highest) of {args.rounds} "
        f"rounds, {taken}; ratios by round"
    )
    print_table(found, floor, flops)
    if args.profile:
        print_profile(found, floor)


def main(argv: list[str]) -> int:
    """Prints the table."""
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=positive, default=7, help="steps of each contestant that count (default: 7)")
    parser.add_argument("--megatron-core", metavar="DIR", help="folder that PyPI's megatron-core is installed in")
    parser.add_argument("--one-by-one", action="store_true", help="end each contestant before the next one starts")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=value, help=f"default: {value}")
    args = parsed(parser, argv)
    return run_tool(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
