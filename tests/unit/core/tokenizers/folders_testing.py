"""Tokenizer folders as programs of many versions have left them, drawn by a seed."""

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from test_build_tokenizer import CORPUS, NASTY, byte_level_tokenizer, llama_like_tokenizer, make_sentencepiece
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# A chat's marks, words, pieces with spaces and letters that a normalizer changes, and one that the vocabulary has.
TOKENS = ("<|im_start|>", "<|im_end|>", "<A b>", "zebra", "Éclair", " lead", "tail ", "▁mid", "the", "\n\n", "12")
TEXTS = [
    *NASTY, *CORPUS[:3],
    "The zebra's Éclair ZEBRA éclair e\u0301clair zebras (zebra) leadtail  lead tail  x ▁mid\n\n12 123",
    "<|im_start|>user\nhi <|im_end|>\n <|im_start|> x<|im_end|><A b>y <A  b> <a b>", "the they other\n\n\nthe  the",
    "</S> <S> <s>x</s>y <pad> [PAD]<unk>",
]  # fmt: skip


def split_by_regex() -> tokenizers.Tokenizer:
    """As newer models' tokenizer.json: a pattern cuts words, bytes stand for themselves."""
    tokenizer = byte_level_tokenizer()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """As newer Llama-like tokenizer.json, without a normalizer."""
    tokenizer = llama_like_tokenizer()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return tokenizer


def lower_case() -> tokenizers.Tokenizer:
    """With a normalizer that changes what added tokens are compared with."""
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """Not byte-pair encoding."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return tokenizer


def make_bases(folder: Path) -> dict[str, bytes]:
    """Files that variants are built on, by name: kinds of tokenizer.json, and a tokenizer.model."""
    makers = (byte_level_tokenizer, llama_like_tokenizer, split_by_regex, metaspace, lower_case, unigram)
    bases = {maker.__name__: maker().to_str().encode() for maker in makers}
    return bases | {"model": (make_sentencepiece(folder / "model") / "tokenizer.model").read_bytes()}


def _token(draw: random.Random, content: str, typed: bool) -> Any:
    """A text, or an object as one of the versions of transformers writes it, which may have to say that it is one."""
    if draw.random() < 0.6:
        return content
    token: dict[str, Any] = {"content": content} | {flag: draw.random() < 0.3 for flag in FLAGS}
    if typed:
        token["__type"] = "AddedToken"
    if draw.random() < 0.3:
        token["special"] = draw.random() < 0.7
    return token


def _place_added_tokens(draw: random.Random, files: dict[str, Any], settings: dict[str, Any], first: int) -> None:
    """Tokens behind the vocabulary, in the places that know of some or all of them."""
    chosen = draw.sample(TOKENS, draw.choice((0, 0, 1, 2, 3)))
    tokens = {
        first + i: {"content": token, **{flag: draw.random() < 0.3 for flag in FLAGS}, "special": draw.random() < 0.5}
        for i, token in enumerate(chosen)
    }
    if tokens and "tokenizer.json" in files and draw.random() < 0.6:
        content = files["tokenizer.json"]
        known = content["model"]["vocab"]
        content["added_tokens"] += [{"id": i, **token} for i, token in tokens.items() if token["content"] not in known]
    if tokens and draw.random() < 0.4:
        files["added_tokens.json"] = {token["content"]: i for i, token in tokens.items()}
    if tokens and draw.random() < 0.5:
        settings["added_tokens_decoder"] = {
            str(i): {
                flag: not value if value is not token["content"] and draw.random() < 0.1 else value
                for flag, value in token.items()
                if flag == "content" or draw.random() < 0.8
            }
            for i, token in tokens.items()
        }
    if chosen and draw.random() < 0.2:
        settings["additional_special_tokens"] = [_token(draw, token, True) for token in chosen[:2]]
    elif chosen and draw.random() < 0.1:
        settings["extra_special_tokens"] = {"mark_token": chosen[0]} if draw.random() < 0.5 else [chosen[0]]
    if draw.random() < 0.05:
        settings["image_token"] = draw.choice(TOKENS)


def _special_tokens(draw: random.Random, typed: bool) -> dict[str, Any]:
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    found: dict[str, Any] = {}
    for name, token in own.items():
        kind = draw.random()
        if name == "pad_token" and kind < 0.6:
            continue
        if kind < 0.05:
            found[name] = None
        elif kind < 0.95:
            found[name] = _token(draw, draw.choice(TOKENS[:2]) if draw.random() < 0.1 else token, typed)
    return found


def _settings(draw: random.Random) -> dict[str, Any]:
    choices: dict[str, tuple[Any, ...]] = {
        "tokenizer_class": (
            "PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend", None,
        ),
        "add_bos_token": (True, False),
        "add_eos_token": (True, False),
        "legacy": (True, False),
        "add_prefix_space": (True, False, None),
        "clean_up_tokenization_spaces": (True, False),
        "model_max_length": (8, 512, 10**30),
        "use_default_system_prompt": (False,),
        "sp_model_kwargs": ({},),
        "chat_template": ("{{ messages }}",),
        "padding_side": ("left",),
    }  # fmt: skip
    found = {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.5}
    if draw.random() < 0.05:
        found["split_special_tokens"] = True
    return found


def draw_folder(folder: Path, bases: dict[str, bytes], seed: int) -> None:
    """Writes variant number `seed` into `folder`."""
    draw = random.Random(seed)
    files: dict[str, Any] = {}
    kind = draw.choice([name for name in bases if name != "model"])
    with_json = draw.random() < 0.7
    if with_json:
        files["tokenizer.json"] = json.loads(bases[kind])
    if not with_json or draw.random() < 0.2:
        (folder / "tokenizer.model").write_bytes(bases["model"])
    first = len(files["tokenizer.json"]["model"]["vocab"]) if with_json else 500
    settings = _settings(draw)
    _place_added_tokens(draw, files, settings, first)
    if draw.random() < 0.9:
        settings |= _special_tokens(draw, True)
    if draw.random() < 0.4:
        files["special_tokens_map.json"] = _special_tokens(draw, False)
    if draw.random() < 0.9:
        files["tokenizer_config.json"] = settings
    if with_json or draw.random() < 0.5:
        files["config.json"] = {"model_type": "mixtral"}
    mark = b"\xef\xbb\xbf" if draw.random() < 0.1 else b""
    for name, content in files.items():
        (folder / name).write_bytes(mark + json.dumps(content).encode())
