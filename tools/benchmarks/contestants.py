"""The training steps that train_step.py compares, each in its own process, which takes a step on request.

Megatron-Core has the top-level name of this project, and every program has its own imports, threads and allocator: so
each runs as its users run it. A process reads one JSON line, what to build, and writes one when it is ready; then it
answers every further line with its next step. Nothing of this project is imported before it is known that it is wanted.
"""

import contextlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OURS = "this project"


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What every contestant trains on."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    num_experts: int
    moe_router_topk: int
    vocab_size: int
    """Rows of the embedding, padding included."""
    seq_length: int
    micro_batch_size: int
    params_dtype: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.params_dtype]

    def tokens(self) -> Tensor:
        """The same tokens for all: int64 [micro batch, sequence]."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.micro_batch_size, self.seq_length)
        return torch.randint(self.vocab_size, shape, generator=generator).to(self.device)


@dataclass(frozen=True)
class Contestant:
    """A model that can take steps; `step` returns its loss."""

    model: torch.nn.Module
    step: Callable[[], float]


def _our_config(shape: StepShape) -> Any:
    from megatron.core.config import ModelConfig

    not_of_the_model = ("seq_length", "micro_batch_size", "device")
    return ModelConfig(**{name: value for name, value in asdict(shape).items() if name not in not_of_the_model})


def our_step(shape: StepShape) -> Contestant:
    """The step of this project, without the loop's logging."""
    from megatron.core.distributed.gradient_buffers import GradientBuffers
    from megatron.core.host_memory import keep_freed_memory
    from megatron.core.microbatch import Microbatch
    from megatron.core.models.mixtral.mixtral_model import MixtralModel
    from megatron.core.optimizer.adamw import AdamW
    from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.optimizer.param_scheduler import StepRates
    from megatron.core.parallel_state import ProcessGroups
    from megatron.core.tensor_parallel.parameter import initialize_parameters

    if shape.device == "cpu":
        keep_freed_memory()
    device = torch.device(shape.device)
    model = MixtralModel(_our_config(shape), groups=ProcessGroups(), sequence_parallel=False, device=device)
    initialize_parameters(model, 0, 1)
    buffers = GradientBuffers(model, ProcessGroups())
    optimizer = MixedPrecisionOptimizer(buffers, AdamW(OptimizerConfig()), OptimizerConfig(), ProcessGroups())
    tokens = shape.tokens()

    def step() -> float:
        with torch.profiler.record_function("gradient handling"):
            buffers.start_step(1)
        loss = model(tokens, Microbatch(labels=tokens)).tensor.mean()
        loss.backward()
        with torch.profiler.record_function("gradient handling"):
            buffers.finalize()
        with torch.profiler.record_function("optimizer"):
            optimizer.step(StepRates(1e-4, 1e-4, 0.1))
        return loss.item()

    return Contestant(model, step)


def _with_adamw(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Contestant:
    """Forward, backward, clipping and torch's fused AdamW, with float32 masters for narrow parameters."""
    parameters = list(model.parameters())
    masters = [p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in parameters]
    adam = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
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
        return value.item()

    return Contestant(model, step)


def transformers_step(shape: StepShape, implementation: str) -> Contestant:
    """transformers' Mixtral with one of its implementations of the experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from megatron.core.models.mixtral.hf_config import hf_config_from_model

    options: dict[str, Any] = {"experts_implementation": implementation}
    config = MixtralConfig(**hf_config_from_model(_our_config(shape), sliding_window=None, bos=1, eos=2), **options)
    model: torch.nn.Module = MixtralForCausalLM(config)
    model = model.to(shape.device, shape.dtype)
    tokens = shape.tokens()
    return _with_adamw(model, lambda: model(tokens, labels=tokens, use_cache=False).loss)


def _core(name: str) -> Any:
    """A module of Megatron-Core, which has the names of this project's."""
    return importlib.import_module(f"megatron.core.{name}" if name else "megatron.core")


def _without_cuda() -> None:
    """Lets Megatron-Core run on a CPU: what it asks of CUDA is answered, or not needed without dropout."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    _core("tensor_parallel.random").CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    moe_utils = _core("transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):  # read without having been set where Transformer Engine is absent
        moe_utils.te_general_gemm = None


def megatron_core_step(shape: StepShape, folder: str) -> Contestant:
    """Megatron-Core's GPTModel and torch's fused AdamW.

    On a GPU its layers and experts are Transformer Engine's, if that is installed; elsewhere they are its local ones,
    with one expert after another.
    """
    found = Path(_core("").__file__).resolve()
    if not found.is_relative_to(Path(folder).resolve()):
        raise ImportError(f"megatron.core came from {found}, not from {folder}")
    if shape.device == "cpu":
        _without_cuda()
    dist.init_process_group("gloo" if shape.device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    _core("parallel_state").initialize_model_parallel()
    if shape.device != "cpu":
        _core("tensor_parallel.random").model_parallel_cuda_manual_seed(1)
    specs = _core("models.gpt.gpt_layer_specs")
    engine = shape.device != "cpu" and importlib.util.find_spec("transformer_engine") is not None
    if engine:
        layers = specs.get_gpt_layer_with_transformer_engine_spec(num_experts=shape.num_experts, moe_grouped_gemm=True)
    else:
        layers = specs.get_gpt_layer_local_spec(num_experts=shape.num_experts, normalization="RMSNorm")
    config = _core("transformer.transformer_config").TransformerConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, ffn_hidden_size=shape.ffn_hidden_size,
        moe_ffn_hidden_size=shape.ffn_hidden_size, num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups, num_moe_experts=shape.num_experts,
        moe_router_topk=shape.moe_router_topk, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather", add_bias_linear=False, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, bias_activation_fusion=True, bias_dropout_fusion=True,
        normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=shape.device == "cpu", gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        moe_grouped_gemm=engine, bf16=shape.dtype == torch.bfloat16, params_dtype=shape.dtype,
    )  # fmt: skip
    model = _core("models.gpt.gpt_model").GPTModel(
        config, layers, vocab_size=shape.vocab_size, max_sequence_length=shape.seq_length,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    model.to(shape.device, shape.dtype)
    tokens = shape.tokens()
    positions = torch.arange(shape.seq_length, device=shape.device).expand_as(tokens).contiguous()
    mask = torch.ones(shape.seq_length, shape.seq_length, dtype=torch.bool, device=shape.device).triu(1)[None, None]
    return _with_adamw(model, lambda: model(tokens, positions, mask, labels=tokens).mean())


def build(kind: str, argument: str, shape: StepShape) -> Contestant:
    """The contestant that goes by `kind`: ours, transformers (implementation), megatron-core (its folder)."""
    if kind == "ours":
        return our_step(shape)
    if kind == "transformers":
        return transformers_step(shape, argument)
    return megatron_core_step(shape, argument)


def _peak_resident_bytes() -> int:
    """The most memory this process was resident with, 0 where Linux does not say it.

    The parent's counts into what getrusage says.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _timed(contestant: Contestant, shape: StepShape) -> dict[str, float]:
    synchronize = torch.cuda.synchronize if shape.device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    loss = contestant.step()
    synchronize()
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    peak = torch.cuda.max_memory_allocated() if shape.device == "cuda" else _peak_resident_bytes()
    return {"seconds": seconds, "loss": loss, "peak_bytes": peak}


def serve() -> None:
    """The process: see the top of the file."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.filterwarnings("ignore")
    line = sys.stdin.readline()
    if not line:
        return  # who started it has ended
    order = json.loads(line)
    root = Path(__file__).resolve().parents[2]
    elsewhere = [path for path in sys.path[1:] if Path(path).resolve() != root]
    sys.path[:] = [order["argument"] if order["kind"] == "megatron-core" else str(root), *elsewhere]
    shape = StepShape(**order["shape"])
    contestant = build(order["kind"], order["argument"], shape)
    parameters = sum(parameter.numel() for parameter in contestant.model.parameters())
    answers.write(json.dumps({"parameters": parameters, "threads": torch.get_num_threads()}) + "\n")
    for line in itertools.takewhile(bool, iter(sys.stdin.readline, "")):
        if line.strip() == "profile":
            from tools.benchmarks.step_profile import profile_groups

            answers.write(json.dumps(profile_groups(contestant.model, contestant.step)) + "\n")
        else:
            answers.write(json.dumps(_timed(contestant, shape)) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] or sys.stdin.isatty():
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    serve()
