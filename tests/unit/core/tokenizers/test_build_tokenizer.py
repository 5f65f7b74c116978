"""Tokenizers against the libraries they stand in for, on text that is hard to get right."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron.core.config import TokenizerConfig
from megatron.core.tokenizers import build_tokenizer
from megatron.core.tokenizers.pretrained import TokenizerFromJson
from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron.core.tokenizers.transformers_tokenizer import TransformersTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 10 o'clock; they've gone, I'd say we'll see.",
    "def f(x):\n    return {k: v ** 2 for k, v in x.items()}\n\n\nclass A:\n\tpass\n",
    "Die Straße führt über Köln. Où est l'été? Ελληνικά και русский, 中文字符, 日本語テキスト, 한국어.",
] * 20
NASTY = [
    "",
    " ",
    "\n",
    "   \t \n\n  x  ",
    ".  Guido   van  Rossum ",
    "a" * 500,
    "ab" * 300 + "  " * 100,
    "it's IT'S they'VE we'll 'd's''t ’s",
    "x\u00a0y\u3000z\u2028w\u200bv\ufeffu\x00t\x1cs",
    "e\u0301 é ﬁ Å ½ ²³ ٣٤ Ⅷ 1234567",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 \U0001f9ff\U0010ffff",
    "中文字符。日本語テキスト、한국어",
    "<s>a</s> b</s><unk><|endoftext|> </s>\n<s>",
    "▁x▁▁ y Ġz",
    "\r\nline\r\n\tTabbed\v\f",
]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def llama_like_tokenizer() -> tokenizers.Tokenizer:
    """As Mixtral's: no pre-tokenisation, spaces replaced, bytes for unknown characters, <s> put first."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *bytes_]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer


def make_folder(folder: Path, tokenizer: tokenizers.Tokenizer, **settings: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    default = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {**default, **settings})
    return folder


def make_sentencepiece(folder: Path) -> Path:
    folder.mkdir()
    (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        split_digits=True, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    return folder


def from_hf(model: Path, **options: Any):
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(model), **options))


def automatic(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("make", [byte_level_tokenizer, llama_like_tokenizer])
def test_tokenizer_json_equals_transformers(tmp_path: Path, make, tokenizer_class: str) -> None:
    folder = make_folder(
        tmp_path / "hf", make(), tokenizer_class=tokenizer_class, unk_token="<unk>", add_bos_token=True
    )
    write_json(folder / "config.json", {"model_type": "mixtral", "rope_theta": 1e6})
    ours, theirs = from_hf(folder), automatic(folder)
    assert isinstance(ours, TokenizerFromJson)
    assert (ours.vocab_size, ours.eod, ours.bos) == (len(theirs), theirs.eos_token_id, theirs.bos_token_id)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in NASTY]
    assert [ours.tokenize(text) for text in NASTY] == expected == ours.tokenize_batch(NASTY)
    for ids in expected:
        assert ours.detokenize(ids) == theirs.decode(ids)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    expected = [tokenizer.encode(text).ids for text in NASTY]
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    assert from_hf(make_folder(tmp_path / "hf", tokenizer)).tokenize_batch(NASTY) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["<extra>"]},
        {"pad_token": "<pad>"},
        {"pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": False, "rstrip": False,
                       "single_word": False, "normalized": False, "special": True}},
        {"split_special_tokens": True},
        {"added_tokens_decoder": {"500": {"content": "brown", "lstrip": True, "rstrip": False, "single_word": False,
                                          "normalized": False, "special": False}}},
    ],
)  # fmt: skip
def test_what_the_configuration_adds_is_left_to_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "hf", byte_level_tokenizer(), unk_token="<unk>", **settings)
    ours, theirs = from_hf(folder), automatic(folder)
    assert isinstance(ours, TransformersTokenizer)
    texts = [*NASTY, "a <extra>b<pad>", "The  brown fox"]
    assert [ours.tokenize(text) for text in texts] == [theirs(t, add_special_tokens=False)["input_ids"] for t in texts]
    assert ours.vocab_size == len(theirs) and ours.eod == theirs.eos_token_id
    assert ours.detokenize(ours.tokenize(CORPUS[1])) == CORPUS[1]
    assert list(ours.identity["sha256"]) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_vocabulary_with_gaps_counts_to_its_largest_id(tmp_path: Path) -> None:
    """An embedding table as long as the number of tokens would be too short."""
    content = json.loads(byte_level_tokenizer().to_str())
    content["model"]["vocab"]["unreached"] = 900
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert from_hf(make_folder(tmp_path / "hf", tokenizer)).vocab_size == 901


@pytest.mark.parametrize("name", ["", "tokenizer.json", "tokenizer_config.json"])
def test_a_folder_or_any_file_in_it_may_be_given(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "hf", byte_level_tokenizer())
    assert from_hf(folder / name).eod == 2


def test_the_end_token_may_be_in_the_special_tokens_map(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", byte_level_tokenizer(), eos_token=None)
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<unk>"}})
    assert from_hf(folder).eod == 0
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(ValueError, match="no eos_token"):
        from_hf(folder)


def test_only_a_sentencepiece_model_is_run_by_sentencepiece(tmp_path: Path) -> None:
    folder = make_sentencepiece(tmp_path / "sp")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    llama = build_tokenizer(
        TokenizerConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(folder / "tokenizer.model"))
    )
    for ours in (from_hf(folder), from_hf(folder / "tokenizer.model"), llama):
        assert isinstance(ours, SentencePieceTokenizer)
        assert (ours.vocab_size, ours.eod, ours.bos) == (500, 2, 1)
        assert ours.tokenize_batch(NASTY) == [model.encode(text) for text in NASTY] == list(map(ours.tokenize, NASTY))
        assert ours.detokenize(ours.tokenize(CORPUS[2])) == CORPUS[2]
        assert not {1, 2} & set(ours.tokenize("<s>a</s>")), "text must not become special tokens"


def test_sentencepiece_takes_names_from_the_configuration(tmp_path: Path) -> None:
    folder = make_sentencepiece(tmp_path / "sp")
    pieces = {"0": {"content": "<unk>"}, "2": {"content": "</s>"}}
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<s>"}, "added_tokens_decoder": pieces})
    tokenizer = from_hf(folder)
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.eod == 1
    write_json(folder / "tokenizer_config.json", {"eos_token": "<nowhere>"})
    assert (from_hf(folder).eod, from_hf(folder).vocab_size) == (500, 501), "transformers adds it"
    versioned = (folder / "tokenizer.model").rename(folder / "tokenizer.model.v1")
    with pytest.raises(ValueError, match="<nowhere>"):
        from_hf(versioned)


def gpt2_files(folder: Path) -> tuple[Path, Path, tokenizers.Tokenizer]:
    byte_level = byte_level_tokenizer()
    vocabulary = byte_level.get_vocab()
    vocabulary["<|endoftext|>"] = len(vocabulary)
    merges = json.loads(byte_level.to_str())["model"]["merges"]
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    reference = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    return folder / "vocab.json", folder / "merges.txt", reference


def gpt2(vocab_file: Path, merge_file: Path):
    return build_tokenizer(
        TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab_file), merge_file=str(merge_file))
    )


def test_gpt2_equals_the_tokenizers_library(tmp_path: Path) -> None:
    vocab_file, merge_file, reference = gpt2_files(tmp_path)
    ours = gpt2(vocab_file, merge_file)
    texts = [*NASTY, *CORPUS[:3], *(chr(i) * 3 + " " + chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000)]
    expected = [encoding.ids for encoding in reference.encode_batch(texts)]
    assert ours.tokenize_batch(texts) == expected
    assert ours.tokenize_batch(texts) == expected, "from the cache of words"
    for text, ids in zip(texts, expected):
        assert ours.detokenize(ids) == text
    size = reference.get_vocab_size()
    assert (ours.vocab_size, ours.eod, ours.bos) == (size, size - 1, None)


def test_gpt2_takes_a_long_word_in_its_stride(tmp_path: Path) -> None:
    """Quadratic merging would take hours here."""
    vocab_file, merge_file, reference = gpt2_files(tmp_path)
    word = "theover" * 40000
    assert gpt2(vocab_file, merge_file).tokenize(word) == reference.encode(word).ids


def test_gpt2_refuses_broken_files(tmp_path: Path) -> None:
    vocab_file, merge_file, _ = gpt2_files(tmp_path)
    merges = merge_file.read_text(encoding="utf-8")
    merge_file.write_text(merges + "one two three\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"merges\.txt, line {merges.count(chr(10)) + 1}"):
        gpt2(vocab_file, merge_file)
    vocabulary = json.loads(vocab_file.read_text())
    write_json(vocab_file, {piece: i for piece, i in vocabulary.items() if piece != "<|endoftext|>"})
    with pytest.raises(ValueError, match="endoftext"):
        gpt2(vocab_file, merge_file)
    vocab_file.write_text("{")
    with pytest.raises(ValueError, match=r"vocab\.json is not JSON"):
        gpt2(vocab_file, merge_file)
    with pytest.raises(FileNotFoundError, match="--merge-file"):
        gpt2(vocab_file, tmp_path / "none")


def test_null_tokenizer_reads_integers() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer"), vocab_size=10)
    assert tokenizer.tokenize(" 1 2\n9 ") == [1, 2, 9] and tokenizer.tokenize_batch(["", "3"]) == [[], [3]]
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (10, 9, None)
    assert tokenizer.detokenize([1, 2]) == "1 2"
    for text in ("a", "1.5", "10", "-1"):
        with pytest.raises(ValueError, match=r"NullTokenizer|outside the vocabulary"):
            tokenizer.tokenize(text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(), "--tokenizer-model"),
        (TokenizerConfig(tokenizer_type="Llama2Tokenizer"), "--tokenizer-model"),
        (TokenizerConfig(tokenizer_type="GPT2BPETokenizer"), "--vocab-file"),
        (TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file="v"), "--merge-file"),
        (TokenizerConfig(tokenizer_type="NullTokenizer"), "--vocab-size"),
        (TokenizerConfig(tokenizer_type="Nonesuch"), "Nonesuch"),  # type: ignore[arg-type]
    ],
)
def test_a_missing_flag_is_named(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tokenizer(config)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"some/model does not exist.*not downloaded"):
        from_hf(Path("some/model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no tokenizer"):
        from_hf(tmp_path / "empty")
    folder = make_folder(tmp_path / "hf", byte_level_tokenizer())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        from_hf(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        from_hf(folder)
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "tokenizer.model").write_bytes(b"no protobuf")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model"):
        from_hf(tmp_path / "sp")


def test_remote_code_is_refused_unless_allowed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", byte_level_tokenizer(), auto_map={"AutoTokenizer": ["custom.Custom", None]})
    marker = tmp_path / "ran"
    (folder / "custom.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="--trust-remote-code"):
        from_hf(folder)
    assert not marker.exists()


def test_identity_tells_vocabularies_apart(tmp_path: Path) -> None:
    first = from_hf(make_folder(tmp_path / "a", byte_level_tokenizer())).identity
    assert first == from_hf(make_folder(tmp_path / "b", byte_level_tokenizer(), model_max_length=5)).identity
    assert first["type"] == "PretrainedTokenizerFromHF" and list(first["sha256"]) == ["tokenizer.json"]
    assert first != from_hf(make_folder(tmp_path / "c", llama_like_tokenizer())).identity
    assert first != from_hf(make_folder(tmp_path / "d", byte_level_tokenizer(), eos_token="<s>")).identity
    json.dumps(first)


def test_usual_tokenizers_start_without_torch_and_transformers(tmp_path: Path) -> None:
    folder, spm = make_folder(tmp_path / "hf", byte_level_tokenizer()), make_sentencepiece(tmp_path / "sp")
    program = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from megatron.core.tokenizers import build_tokenizer\n"
        "for model in sys.argv[1:]:\n"
        "    build_tokenizer(SimpleNamespace(tokenizer_type='PretrainedTokenizerFromHF', tokenizer_model=model,\n"
        "                                    trust_remote_code=False)).tokenize('a')\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, folder, spm], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
