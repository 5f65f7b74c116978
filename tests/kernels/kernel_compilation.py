"""Compiles the Triton kernels that a training step launches, for GPUs that are not there; a separate program.

    PYTHONPATH=.:tests python tests/kernels/kernel_compilation.py 90 --types bfloat16 --models 8x7B

It is one because the interpreter that other tests run kernels in must be off before Triton is imported. Models of one
layer are trained for a step on torch's meta device, where shapes are those of real models and values are not needed;
instead of a launch its kernel is compiled, with the signature that Triton derives from the arguments. Prints JSON.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from model_testing import tiny_arguments
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import pretrain_gpt
from megatron.core.fusions import attention, forms, kernels
from megatron.core.fusions.kernels import triton as shelf
from megatron.core.fusions.kernels.triton import persistent_gradient
from megatron.core.fusions.linear import WgradBackend
from megatron.core.microbatch import Microbatch
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.update_rule import Update
from megatron.core.parallel_state import ProcessGroups
from megatron.core.transformer.moe.experts import Experts
from megatron.training.setup import Trainer, build_trainer

META = torch.device("meta")
MODELS: dict[str, dict[str, Any]] = {
    "8x7B": {"hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8,
             "num_experts": 8, "moe_router_topk": 2, "vocab_size": 32000, "make_vocab_size_divisible_by": 128},
    "8x22B": {"hidden_size": 6144, "ffn_hidden_size": 16384, "num_attention_heads": 48, "num_query_groups": 8,
              "num_experts": 8, "moe_router_topk": 2, "vocab_size": 32768, "make_vocab_size_divisible_by": 128},
    "64 experts": {"num_experts": 64, "moe_router_topk": 8, "grad_reduce_in_bf16": True},
    "128 experts": {"num_experts": 128, "moe_router_topk": 8},
    "256 experts": {"num_experts": 256, "moe_router_topk": 8},
    "one expert": {"num_experts": 1, "moe_router_topk": 1},
    # multiples of 8, not of 16
    "half-aligned widths": {"hidden_size": 136, "ffn_hidden_size": 264, "num_attention_heads": 4, "kv_channels": 32},
    # nothing is a multiple of 16
    "odd widths": {"hidden_size": 150, "ffn_hidden_size": 77, "num_attention_heads": 5, "num_query_groups": 5,
                   "num_experts": 5, "moe_router_topk": 3, "vocab_size": 211, "make_vocab_size_divisible_by": 1},
}  # fmt: skip
SEQUENCE, OTHER_LENGTH = 4096, 4095
WITH_DESCRIPTORS = 90
"""The first compute capability that has them, and with them a second kernel of the experts' weight gradients."""
MULTIPROCESSORS = 132
PRECISIONS: tuple[dict[str, Any], ...] = (
    {},
    *({"exp_avg_dtype": kind, "exp_avg_sq_dtype": kind} for kind in ("bf16", "fp16", "fp8")),
    {"main_params_dtype": "bf16-remainder", "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"},
)
"""What the optimizer keeps, besides masters and moments in float32."""


class Compiler:
    """Stands in for a GPU of a compute capability: what would be launched on it is compiled and kept in `compiled`."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: list[tuple[Any, str, dict[str, str]]] = []
        self.context: dict[str, str] = {}
        """What the launches that come next belong to."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """While this lasts."""
        launch = JITFunction.run

        def compile_instead(function: JITFunction, *arguments: Any, **options: Any) -> Any:
            kernel = launch(function, *arguments, **{**options, "warmup": True})
            # what several models share belongs to the first
            if not any(kernel is known for known, _, _ in self.compiled):
                self.compiled.append((kernel, f"{_file(function)}.{function.__name__}", self.context))
            return kernel

        device = SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", self.capability, 32),
        )
        with (
            mock.patch.object(triton.runtime.driver, "_active", device),
            mock.patch.object(JITFunction, "run", compile_instead),
        ):
            yield


class FlashAttention(torch.autograd.Function):
    """Only the memory format of FlashAttention: the output and all gradients lie as the queries, keys and values do."""

    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        return torch.empty_like(operands[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(operand) for operand in ctx.saved_tensors)


def build(model: str, dtype: str) -> Trainer:
    """A model of one layer, with gradients that go into float32 buffers."""
    settings = {"num_layers": 1, "max_position_embeddings": SEQUENCE, "seq_length": SEQUENCE, "micro_batch_size": 1}
    arguments = tiny_arguments(dtype, settings | MODELS[model])
    providers = pretrain_gpt.model_provider, pretrain_gpt.forward_step
    return build_trainer(arguments, ProcessGroups(), META, *providers, initialize=False)


def train_a_step(trainer: Trainer, length: int) -> None:
    """Forward and backward of two microbatches: the first gradient is written, the second added."""
    tokens = torch.empty(1, length, dtype=torch.int64, device=META)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.empty_like(tokens, dtype=torch.float32)}
    trainer.buffers.start_step(2)
    for _ in range(2):
        loss, _ = trainer.forward_step(trainer.model[0], batch, None, Microbatch())
        loss.backward()


def train_both_ways(trainer: Trainer, length: int, has_descriptors: bool) -> None:
    """A step with each kernel of the experts' weight gradients that the device has."""
    backends: list[WgradBackend] = ["tiles", "persistent"] if has_descriptors else ["tiles"]
    for backend in backends:
        for module in trainer.model.modules():
            if isinstance(module, Experts):
                module.wgrad_backend = backend
        train_a_step(trainer, length)


def update(trainer: Trainer) -> None:
    """An update of the weights, and in bfloat16 one with each way of keeping masters and moments."""
    for precision in PRECISIONS if trainer.arguments.model.params_dtype == "bfloat16" else ({},):
        config = replace(trainer.arguments.optimizer, use_precision_aware_optimizer=True, **precision)
        optimizer = MixedPrecisionOptimizer(trainer.buffers, AdamW(config), config, trainer.groups)
        for segment in optimizer.segments:
            optimizer.rule.update(segment, Update(number=1, learning_rate=1.0, weight_decay=0.1, factor=0.5))


def _file(function: JITFunction) -> str:
    return function.__module__.rpartition(".")[2]


def launchable() -> set[str]:
    """Every kernel in the folder; functions that only other kernels call are not launched."""
    modules = [
        importlib.import_module(f"{shelf.__name__}.{info.name}") for info in pkgutil.iter_modules(shelf.__path__)
    ]
    functions = {
        f"{_file(value)}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    }
    called = {name for function in functions.values() for name in function.fn.__code__.co_names}
    return {name for name in functions if name.partition(".")[2] not in called}


def _loops_around_products(ttgir: str) -> int:
    """How deep the products on tensor cores lie in loops: in one alone if loops were flattened."""
    depth = 0
    loops: list[int] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1]:
            loops.pop()
        if "scf.for " in line:
            loops.append(indent)
        elif re.search(r"\b(ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot) ", line):
            depth = max(depth, len(loops))
    return depth


_DESCRIPTORS = {
    "load": r"\bcp\.async\.bulk\.tensor\.\dd\.shared",
    "store": r"\bcp\.async\.bulk\.tensor\.\dd\.global",
    "add": r"\bcp\.reduce\.async\.bulk\.tensor\.\dd\.global\.shared::cta\.add",
}


def report(kernel: Any, name: str, context: dict[str, str]) -> dict[str, Any]:
    """Registers of a thread, bytes of local memory of a thread (spilled registers), shared memory, instructions.

    `loads` counts those that threads make themselves, `descriptors` says what is left to TMA, `loops` how many the
    products are within.
    """
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    ptx = kernel.asm["ptx"]
    return {
        "kernel": name,
        **context,
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared": kernel.metadata.shared,
        "target": re.findall(r"\.target (\w+)", ptx)[0],
        "tensor_cores": sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))),
        "descriptors": sorted({name for name, form in _DESCRIPTORS.items() if re.search(form, ptx)}),
        "loops": _loops_around_products(kernel.asm["ttgir"]),
        "loads": len(re.findall(r"\bld\.global\b|\bcp\.async\.c[ag]\b", ptx)),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, help="80, 90 or 100")
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    args = parser.parse_args()
    compiler = Compiler(args.capability)
    # the products of experts have shapes on the meta device, and their weight gradients are kernels to compile
    row = tuple(kernel for kernel in forms.TABLE["grouped_weight_gradient_"] if kernel.part != "library.meta")
    later: list[tuple[str, dict[str, str]]] = []
    with (
        mock.patch.dict(kernels.DEVICES, {"triton": "meta", "library.meta": "meta"}, clear=True),
        mock.patch.dict(forms.TABLE, {"grouped_weight_gradient_": row}),
        mock.patch.object(attention, "attend", FlashAttention.apply),
        mock.patch.object(persistent_gradient, "_multiprocessors", lambda device: MULTIPROCESSORS),
        compiler.active(),
    ):
        for dtype in args.types:
            for model in args.models:
                compiler.context = {"model": model, "dtype": dtype}
                trainer = build(model, dtype)
                update(trainer)
                train_both_ways(trainer, SEQUENCE, args.capability >= WITH_DESCRIPTORS)
                first = len(compiler.compiled)
                train_both_ways(trainer, OTHER_LENGTH, args.capability >= WITH_DESCRIPTORS)
                later += [(name, context) for _, name, context in compiler.compiled[first:]]
    compiled = [report(*each) for each in compiler.compiled]
    print(json.dumps({"kernels": sorted(launchable()), "compiled": compiled, "compiled_later": later}))


if __name__ == "__main__":
    main()
