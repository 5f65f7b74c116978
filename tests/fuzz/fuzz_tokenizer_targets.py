"""Tokenizer folders to damage, and what reads them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from fuzz_testing import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "core" / "tokenizers"))


def _tokenizer(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from folders_testing import make_bases

        bases = folder.parent / "bases"
        if not bases.exists():
            bases.mkdir()
            for name, content in make_bases(bases).items():
                (bases / f"{name}.base").write_bytes(content)
        known = {path.stem: path.read_bytes() for path in bases.glob("*.base")}
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        added = {"453": {"content": "<|im_end|>", "special": True, "lstrip": False}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
        if kind == "model":
            (folder / "tokenizer.model").write_bytes(known["model"])
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            return
        if kind == "chat":
            (folder / "tokenizer.json").write_bytes(known["byte_level_tokenizer"])
            return
        (folder / "tokenizer.json").write_bytes(known[kind])
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 8, "auto_map": {}}))
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
        (folder / "added_tokens.json").write_text(json.dumps({"<s>": 1}))

    return make


def _read_tokenizer(folder: Path) -> None:
    from megatron.core.tokenizers import build_tokenizer
    from tools.preprocessing.engine import EngineUnavailable, engine_source, make_engine
    from tools.preprocessing.settings import TokenizerFlags

    flags = TokenizerFlags(tokenizer_type="PretrainedTokenizerFromHF", tokenizer_model=str(folder))
    tokenizer = build_tokenizer(flags)
    tokenizer.detokenize(tokenizer.tokenize("The <s>quick</s> brown\nfox 中文"))
    assert tokenizer.identity and tokenizer.eod >= 0 and tokenizer.vocab_size > 0
    try:
        make_engine("gigatoken", tokenizer, engine_source("gigatoken", tokenizer)).encode_batch(["a"])
    except EngineUnavailable as error:
        assert "\n" not in str(error)


def _gpt2(folder: Path) -> None:
    from test_build_tokenizer import gpt2_files

    gpt2_files(folder)


def _read_gpt2(folder: Path) -> None:
    from megatron.core.tokenizers import build_tokenizer
    from tools.preprocessing.engine import EngineUnavailable, engine_source, make_engine
    from tools.preprocessing.settings import TokenizerFlags

    files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    tokenizer = build_tokenizer(TokenizerFlags(tokenizer_type="GPT2BPETokenizer", **files))
    tokenizer.detokenize(tokenizer.tokenize("The quick"))
    for name in ("hf", "gigatoken"):
        try:
            make_engine(name, tokenizer, engine_source(name, tokenizer)).encode_batch(["a"])
        except EngineUnavailable as error:
            assert "\n" not in str(error)


TARGETS = {
    "tokenizer_json": Target(
        [_tokenizer(kind) for kind in ("byte_level_tokenizer", "llama_like_tokenizer", "unigram", "chat")],
        _read_tokenizer,
        ("*token*.json",),
    ),
    "tokenizer_model": Target([_tokenizer("model")], _read_tokenizer, ("tokenizer.model",)),
    "tokenizer_model_settings": Target([_tokenizer("model")], _read_tokenizer, ("tokenizer_config.json",)),
    "gpt2_files": Target([_gpt2], _read_gpt2),
}
