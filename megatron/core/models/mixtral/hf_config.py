"""Hugging Face's config.json of a Mixtral model <-> `ModelConfig`."""

import reprlib
from typing import Any

from megatron.core.config import ModelConfig

SHAPE_FIELDS: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "num_experts": "num_local_experts",
    "moe_router_topk": "num_experts_per_tok",
}
"""Attributes of ModelConfig that the meaning of the weights depends on, with their names in config.json."""
_NO_PLAIN_COUNTS = ("query_groups", "head_dim", "rotary_base", "norm_epsilon")

_LARGEST = 1e15


def _number(config: dict[str, Any], key: str) -> Any:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json: {key} must be a number, got {reprlib.repr(value)}: add it, it is never guessed")
    if not 0 <= value < _LARGEST:  # not so of NaN either
        raise ValueError(f"config.json: {key} must be a number from 0 to 1e15, got {reprlib.repr(value)}")
    return value


def _whole(config: dict[str, Any], key: str) -> int:
    value = _number(config, key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} must be a whole number above zero, got {value!r}")
    return value


def rope_theta_from_hf(config: dict[str, Any]) -> float:
    """Theta of the rotary embedding, from `rope_theta` or transformers 5's `rope_parameters`.

    Raises ValueError if it is missing, given twice with different values, or scaled in a way that is not supported.
    """
    found: list[float] = []
    if config.get("rope_theta") is not None:
        found.append(float(_number(config, "rope_theta")))
    for key in ("rope_parameters", "rope_scaling"):
        parameters = config.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise ValueError(f"config.json: {key} must be an object, got {reprlib.repr(parameters)}")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"config.json: {key} asks for {reprlib.repr(parameters)}; only plain rotary embeddings are supported"
            )
        if parameters.get("rope_theta") is not None:
            found.append(float(_number(parameters, "rope_theta")))
    if not found:
        raise ValueError(
            "config.json has no rope theta: add rope_theta (Mixtral 8x7B: 1000000.0) or rope_parameters.rope_theta"
        )
    if len(set(found)) > 1:
        raise ValueError(f"config.json gives different rope thetas: {found}")
    return found[0]


def refuse_quantized(config: dict[str, Any]) -> None:
    """Raises ValueError if config.json says, in any of the ways in use, that the weights are quantized."""
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(key)
        if settings is not None:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            how = f" ({method[:40]})" if isinstance(method, str) else ""
            raise ValueError(f"config.json: {key}{how}: quantized weights are not supported, use the unquantized model")


def model_config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The model that a Hugging Face config.json describes.

    `params_dtype` is the file's dtype where `ModelConfig` has it, otherwise float32. Raises ValueError for another
    architecture, a missing number, or an option that would change the model and is not supported.
    """
    refuse_quantized(config)
    kind = config.get("model_type")
    if kind != "mixtral":
        raise ValueError(f"config.json: model_type is {reprlib.repr(kind)}, only 'mixtral' is supported")
    if config.get("tie_word_embeddings"):
        raise ValueError("config.json: tie_word_embeddings is true; only untied embeddings are supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act is {reprlib.repr(config['hidden_act'])}, only 'silu' is supported")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("config.json asks for biases, Mixtral has none")
    if "num_key_value_heads" not in config:
        raise ValueError("config.json has no num_key_value_heads: add it, it is never guessed")
    groups = config["num_key_value_heads"]
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    counts = {ours: theirs for ours, theirs in SHAPE_FIELDS.items() if ours not in _NO_PLAIN_COUNTS}
    values: dict[str, Any] = {
        **{ours: _whole(config, theirs) for ours, theirs in counts.items()},
        "num_query_groups": None if groups is None else _whole(config, "num_key_value_heads"),
        "kv_channels": None if config.get("head_dim") is None else _whole(config, "head_dim"),
        "max_position_embeddings": _whole(config, "max_position_embeddings"),
        "rotary_base": rope_theta_from_hf(config),
        "norm_epsilon": float(_number(config, "rms_norm_eps")),
        "init_method_std": float(_number({"initializer_range": 0.02} | config, "initializer_range")),
        "params_dtype": dtype if dtype in ("float32", "bfloat16", "float64") else "float32",
    }
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"config.json describes no model: {error}") from None


def sliding_window_from_hf(config: dict[str, Any]) -> int | None:
    """Tokens each position may attend to, itself included; None if there is no such limit."""
    if config.get("sliding_window") is None:
        return None
    window = _whole(config, "sliding_window")
    return window if window < _whole(config, "max_position_embeddings") else None


def check_config_matches(model: ModelConfig, config: dict[str, Any]) -> None:
    """Raises ValueError, listing the fields, if config.json describes another model than `model`."""
    described = model_config_from_hf(config)
    differences = [
        f"{theirs} is {getattr(described, ours)} in config.json but {getattr(model, ours)} in the checkpoint"
        for ours, theirs in SHAPE_FIELDS.items()
        if getattr(described, ours) != getattr(model, ours)
    ]
    if differences:
        raise ValueError("the Hugging Face config is of another model: " + "; ".join(differences))


def hf_config_from_model(
    model: ModelConfig, *, sliding_window: int | None, bos: int | None, eos: int | None
) -> dict[str, Any]:
    """A config.json for `model`, without the type of the weights; `bos` and `eos` are token ids, null if unknown.

    `rope_theta` and `head_dim` stand where every version of transformers finds them.
    """
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{theirs: getattr(model, ours) for ours, theirs in SHAPE_FIELDS.items()},
        "max_position_embeddings": model.max_position_embeddings,
        "sliding_window": sliding_window,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }


def hf_config_with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with every field kept and the type of the weights set to `dtype`."""
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}
