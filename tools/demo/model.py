"""A byte-level BPE tokenizer and a random Mixtral of a few million parameters, both in Hugging Face form."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron.core.config import ModelConfig
from megatron.core.models.mixtral.hf_config import hf_config_from_model

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 2000
MODEL = ModelConfig(
    vocab_size=VOCAB_SIZE, hidden_size=128, ffn_hidden_size=256, num_layers=4, num_attention_heads=8,
    num_query_groups=4, num_experts=4, rotary_base=1e6, max_position_embeddings=1024,
)  # fmt: skip


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Trains a tokenizer on `texts`, saves it in `folder` as Hugging Face tokenizers are, and returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS}
    kind = "PreTrainedTokenizerFast"
    config = {"tokenizer_class": kind, "model_max_length": 1024, "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", config | names)
    _write_json(folder / "special_tokens_map.json", names)
    return tokenizer.get_vocab_size()


def make_model(shape: ModelConfig, folder: Path, seed: int = 0) -> int:
    """Saves a freshly drawn Mixtral in `folder` with transformers; returns its number of parameters."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = MixtralConfig(**hf_config_from_model(shape, sliding_window=None, bos=0, eos=1))
    model = MixtralForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
