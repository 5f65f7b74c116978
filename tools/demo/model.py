"""A byte-level BPE tokenizer and a random Mixtral of a few million parameters, both in Hugging Face form."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Shape of the demo's model."""

    vocab_size: int = 2000
    hidden_size: int = 128
    ffn_hidden_size: int = 256
    num_layers: int = 4
    num_attention_heads: int = 8
    num_query_groups: int = 4
    num_experts: int = 4
    rotary_base: float = 1000000.0
    max_position_embeddings: int = 1024


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Trains a tokenizer on `texts`, saves it in `folder` as Hugging Face tokenizers are, and returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config | names)
    _write_json(folder / "special_tokens_map.json", names)
    return tokenizer.get_vocab_size()


def make_model(size: ModelSize, folder: Path, seed: int = 0) -> int:
    """Saves a freshly drawn Mixtral in `folder` with transformers; returns its number of parameters."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_query_groups,
        num_local_experts=size.num_experts,
        num_experts_per_tok=2,
        max_position_embeddings=size.max_position_embeddings,
        rope_parameters={"rope_theta": size.rotary_base, "rope_type": "default"},
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
