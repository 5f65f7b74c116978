"""A rank of NVIDIA's own GPTModel on a CPU: saves its weights, or loads a folder and writes its logits.

Arguments: save or load, the step's folder, the Hugging Face folder that gives the shape, the file for the result, and
the tensor- and expert-parallel sizes. MEGATRON_CORE names the folder that megatron-core is installed in.
"""

import argparse
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ["MEGATRON_CORE"])
import torch
import torch.distributed as dist
import torch.nn.functional as F

# what it asks CUDA for without using it
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402


class _NoTracker:
    """Stands for the tracker of random states on GPUs."""

    def is_initialized(self) -> bool:
        return True

    def fork(self, name: str = "") -> AbstractContextManager[None]:
        return nullcontext()


def build(config: dict[str, Any], padded: int, tp: int, ep: int) -> Any:
    """This rank's part of the model, in float32."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=tp if ep == 1 else 1
    )
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron.core") and hasattr(module, "get_cuda_rng_tracker"):
            module.get_cuda_rng_tracker = lambda *_, **__: _NoTracker()
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 asks for it without TransformerEngine, too
        moe_utils.te_general_gemm = None
    experts = config["num_local_experts"]
    settings = TransformerConfig(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"], num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"], num_moe_experts=experts,
        moe_router_topk=config["num_experts_per_tok"], layernorm_epsilon=config["rms_norm_eps"],
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather", normalization="RMSNorm",
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, hidden_dropout=0, attention_dropout=0,
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=tp if ep == 1 else 1,
        params_dtype=torch.float32, pipeline_dtype=torch.float32, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm")
    torch.manual_seed(1)
    return GPTModel(
        settings, spec, vocab_size=padded, max_sequence_length=64, position_embedding_type="rope",
        rotary_base=int(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]),
        share_embeddings_and_output_weights=False,
    ).eval()  # fmt: skip


def training_arguments(config: dict[str, Any], padded: int, tp: int) -> argparse.Namespace:
    """The arguments that describe the model."""
    return argparse.Namespace(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"], num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"], group_query_attention=True,
        num_experts=config["num_local_experts"], moe_router_topk=config["num_experts_per_tok"], rotary_base=1_000_000,
        norm_epsilon=config["rms_norm_eps"], max_position_embeddings=64, seq_length=64, padded_vocab_size=padded,
        tensor_model_parallel_size=tp, params_dtype=torch.float32,
    )  # fmt: skip


def save(model: Any, folder: Path, config: dict[str, Any], padded: int, tp: int) -> None:
    """As its training does."""
    args = training_arguments(config, padded, tp)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {"model": model.sharded_state_dict(), "args": args, "checkpoint_version": 3.0, "iteration": 7}
    dist_checkpointing.save(state, str(folder), ("torch_dist", 1))


def logits(model: Any, folder: Path, tp: int) -> torch.Tensor:
    """The model's output for some tokens, with the weights of `folder`."""
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
    model.load_state_dict(state["model"])
    tokens, positions = torch.arange(3, 35)[None], torch.arange(32)[None]
    mask = torch.triu(torch.ones(1, 1, 32, 32, dtype=torch.bool), 1)
    with torch.no_grad():
        mine = model(tokens, positions, mask).contiguous()
    parts = [torch.empty_like(mine) for _ in range(tp)]
    dist.all_gather(parts, mine, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)


def main() -> None:
    """One rank."""
    action, folder, shape, result, tp, ep = sys.argv[1:]
    config = json.loads((Path(shape) / "config.json").read_text())
    padded = -(-config["vocab_size"] // 8) * 8
    dist.init_process_group("gloo")
    model = build(config, padded, int(tp), int(ep))
    if action == "save":
        save(model, Path(folder), config, padded, int(tp))
    else:
        found = logits(model, Path(folder), int(tp))
        if dist.get_rank() == 0:
            torch.save(found, result)
    dist.barrier()


if __name__ == "__main__":  # its writer starts processes, which import this file
    main()
