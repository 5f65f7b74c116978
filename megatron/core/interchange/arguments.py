"""The `args` of a checkpoint, under Megatron's names, <-> `ModelConfig`."""

from argparse import Namespace
from dataclasses import fields
from typing import Any

from megatron.core.config import ModelConfig
from megatron.core.interchange.layout import Layout

_DTYPES = ("float32", "bfloat16", "float16", "float64")
# What every Mixtral model is, in Megatron's words; a checkpoint that says otherwise is of another architecture.
_ARCHITECTURE: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": True,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "apply_layernorm_1p": False,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
}
# What changes the numbers of a model of the same weights; no Mixtral has it.
_FORMULAS: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "squared_relu": False,
    "quick_geglu": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "softmax_type": "vanilla",
    "no_rope_freq": None,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_group_topk": None,
    "moe_apply_probs_on_input": False,
}
_REQUIRED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "rotary_base", "norm_epsilon",
    "num_experts", "moe_router_topk",
)  # fmt: skip


def model_args_namespace(
    model: ModelConfig,
    layout: Layout,
    seq_length: int,
    extra: dict[str, Any] | None = None,
) -> Namespace:
    """The `args` to store with `model`: plain values under Megatron's names.

    `extra` (tokenizer, sliding window, training state) is added last and may replace any of them.
    """
    values: dict[str, Any] = {field.name: getattr(model, field.name) for field in fields(model)}
    values.update(_ARCHITECTURE)
    values.update(
        num_query_groups=model.query_groups,
        group_query_attention=model.query_groups != model.num_attention_heads,
        kv_channels=model.head_dim,
        padded_vocab_size=model.padded_vocab_size(layout.tensor),
        bf16=model.params_dtype == "bfloat16",
        fp16=model.params_dtype == "float16",
        seq_length=seq_length,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.etp,
        virtual_pipeline_model_parallel_size=None,
        moe_grouped_gemm=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
    values.update(extra or {})
    return Namespace(**values)


def model_config_from_args(args: Namespace, vocab_size: int | None = None) -> ModelConfig:
    """The model that a checkpoint's `args` describe.

    The true vocabulary is `vocab_size` if given, else the stored one, else None: checkpoints of other programs may
    only know the padded size, and then the user has to say how much of it is real. Raises ValueError if a number is
    missing or the architecture is not Mixtral's.
    """
    for name, expected in (_ARCHITECTURE | _FORMULAS).items():
        stored = getattr(args, name, expected)
        if stored is not None and stored != expected:
            raise ValueError(f"the checkpoint was made with {name}={stored!r}; a Mixtral model has {expected!r}")
    for name in _REQUIRED:
        if getattr(args, name, None) is None:
            raise ValueError(f"the checkpoint's args have no {name}: it is not a Mixtral checkpoint")
    stored_values = {field.name: getattr(args, field.name, None) for field in fields(ModelConfig)}
    values = {name: value for name, value in stored_values.items() if value is not None}
    if getattr(args, "moe_ffn_hidden_size", None) is not None:
        values["ffn_hidden_size"] = args.moe_ffn_hidden_size
    if not getattr(args, "group_query_attention", True):
        values["num_query_groups"] = args.num_attention_heads
    dtype = str(getattr(args, "params_dtype", "float32")).removeprefix("torch.")
    values["params_dtype"] = dtype if dtype in _DTYPES else "float32"
    balancing = values.get("moe_router_load_balancing_type")
    if balancing not in ("aux_loss", "none"):
        values.pop("moe_router_load_balancing_type", None)
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    try:
        return ModelConfig(**values)
    except TypeError as error:
        raise ValueError(f"the checkpoint's args have a value of the wrong type: {error}") from error
