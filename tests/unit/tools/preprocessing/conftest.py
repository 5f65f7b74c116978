"""Tokenizers and texts for the tests of preprocessing."""

import importlib.util
import random
from pathlib import Path
from pydoc_data import topics

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

_SPECIALS = (
    "<s> </s> <unk> <0x0A> [INST] <|endoftext|> ﬁ ① é é 👩‍👩‍👧 🏳️‍🌈 مرحبا שלום 한국 日本語 中文 \U0010ffff \ue000 𝔘 Å İ "
    "ß ǅ def return don't I'LL 1234567 3.14 http://a.b/c?d=e&f the ing == -> // 's 're 'll \U000331ff ࢏ ▁ \ufffd"
).split(" ")
_SPACES = " \t\n\r\v\f\0\x85\xa0\u2028\u3000\ufeff\u200b\u200d\u2581"


def _piece(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.25:
        return chr(draw.randrange(32, 127))
    if kind < 0.35:
        return draw.choice(_SPACES)
    if kind < 0.6:
        return draw.choice(_SPECIALS)
    if kind < 0.75:
        return draw.choice(" \n") * draw.randrange(1, 20)
    code = draw.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)


@pytest.fixture(scope="session")
def nasty_strings() -> list[str]:
    """20,000 strings of spaces, special tokens, scripts, joined, unassigned and new characters, and code."""
    draw = random.Random(5)
    sizes = (0, 1, 2, 3, 5, 10, 30, 60)
    return ["".join(_piece(draw) for _ in range(draw.choice(sizes))) for _ in range(20_000)]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of Mixtral's kind: byte-pair encoding with byte fallback, spaces kept."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [line for text in list(topics.topics.values())[:40] for line in text.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=1000, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small byte-level tokenizer.json, as GPT-2's kind, and GPT-2's own two files of it."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<unk>", "<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(topics.topics.values())[:40], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


@pytest.fixture(scope="session")
def mixtral_model() -> Path:
    """The vocabulary of Mixtral, where the package mistral-common is installed."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed")
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"
