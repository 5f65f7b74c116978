"""Folders of tokenizers as people have them: added tokens, marks of Windows editors, other names, wrong types."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_build_tokenizer import NASTY, byte_level_tokenizer, from_hf, make_folder, make_sentencepiece, write_json

from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron.core.tokenizers.transformers_tokenizer import TransformersTokenizer

CHAT = ["<|im_start|>", "<|im_end|>"]
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def added(first: int) -> dict[str, Any]:
    """The chat tokens as tokenizer_config.json has them."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {str(first + number): {"content": token, "special": True, **flags} for number, token in enumerate(CHAT)}


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json", "both"])
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_added_tokens_have_the_ids_of_transformers(tmp_path: Path, place: str, eos: str) -> None:
    from transformers import AutoTokenizer

    folder = make_sentencepiece(tmp_path / "sp")
    first = from_hf(folder).vocab_size
    settings: dict[str, Any] = SETTINGS | {"eos_token": eos}
    if place != "tokenizer_config.json":
        write_json(folder / "added_tokens.json", {token: first + number for number, token in enumerate(CHAT)})
    if place != "added_tokens.json":
        settings["added_tokens_decoder"] = added(first)
    write_json(folder / "tokenizer_config.json", settings)
    ours, theirs = from_hf(folder), AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(ours, TransformersTokenizer) and ours.vocab_size == first + 2
    assert ours.eod == (2 if eos == "</s>" else first + 1)
    for text in [*NASTY, "<|im_start|>user\nhi<|im_end|>\n<|im_start|> x"]:
        assert ours.tokenize(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert first in ours.tokenize(f"a{CHAT[0]}b")


def test_marks_of_windows_editors_are_skipped(tmp_path: Path) -> None:
    plain = from_hf(make_folder(tmp_path / "plain", byte_level_tokenizer()))
    for name, in_transformers in (("marked", False), ("in transformers", True)):
        folder = make_folder(tmp_path / name, byte_level_tokenizer(), split_special_tokens=in_transformers or None)
        for file in folder.glob("*.json"):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        marked = from_hf(folder)
        assert isinstance(marked, TransformersTokenizer) == in_transformers
        assert marked.tokenize("The quick brown") == plain.tokenize("The quick brown")


def test_a_versioned_model_is_used_by_name_and_tekken_is_named(tmp_path: Path) -> None:
    folder = make_sentencepiece(tmp_path / "sp")
    write_json(folder / "tokenizer_config.json", SETTINGS)
    expected = from_hf(folder).tokenize("The quick")
    versioned = (folder / "tokenizer.model").rename(folder / "tokenizer.model.v3")
    make_folder(tmp_path / "other", byte_level_tokenizer())
    (tmp_path / "other" / "tokenizer.json").rename(folder / "tokenizer.json")
    by_name = from_hf(versioned)
    assert isinstance(by_name, SentencePieceTokenizer) and by_name.tokenize("The quick") == expected
    assert list(by_name.identity["sha256"]) == ["tokenizer.model.v3"]
    assert from_hf(folder).tokenize("The quick") != expected, "of a folder, tokenizer.json comes first"
    (folder / "tokenizer.json").unlink()
    assert from_hf(folder).tokenize("The quick") == expected
    (folder / "tokenizer.model.v1").write_bytes(versioned.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"more than one tokenizer \(tokenizer\.model\.v1, "):
        from_hf(folder)
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "tekken.json").write_text("{}")
    for path in (tmp_path / "mistral", tmp_path / "mistral" / "tekken.json"):
        with pytest.raises((FileNotFoundError, ValueError), match=r"tekken\.json is a tokenizer of Mistral's own kind"):
            from_hf(path)


WRONG = [
    ("eos_token", ["</s>"]), ("eos_token", 2), ("eos_token", {}), ("bos_token", {"content": 1}), ("pad_token", True),
    ("eos_token", {"content": "</s>", "lstrip": "no"}), ("added_tokens_decoder", [1]),
    ("added_tokens_decoder", {"5": "x"}), ("added_tokens_decoder", {"a": {"content": "x"}}),
    ("added_tokens_decoder", {"-1": {"content": "x"}}), ("added_tokens_decoder", {"5": {"content": None}}),
    ("added_tokens_decoder", {"\u0663": {"content": "x"}}), ("added_tokens_decoder", {"9" * 5000: {"content": "x"}}),
    ("additional_special_tokens", "<a>"), ("additional_special_tokens", [1]), ("additional_special_tokens", {"a": "b"}),
    ("extra_special_tokens", {"image": {"content": "<img>"}}), ("extra_special_tokens", "<a>"),
    ("extra_special_tokens", {"a": 1}), ("model_max_length", "512"), ("add_bos_token", "true"),
    ("tokenizer_class", ["LlamaTokenizer"]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_wrong_types_are_named_with_file_and_field(tmp_path: Path, field: str, value: Any, kind: str) -> None:
    folder = tmp_path / "t"
    if kind == "tokenizer.json":
        make_folder(folder, byte_level_tokenizer())
    else:
        make_sentencepiece(folder)
    write_json(folder / "tokenizer_config.json", SETTINGS | {field: value})
    with pytest.raises(ValueError, match=rf"t/tokenizer_config\.json: {field}.* must be ") as caught:
        from_hf(folder)
    assert len(str(caught.value)) < 500 + len(str(folder))


@pytest.mark.parametrize("content", [{"<a>": "5"}, {"<a>": -1}, {"<a>": True}, {"<a>": None}, ["<a>"]])
def test_wrong_types_of_added_tokens(tmp_path: Path, content: Any) -> None:
    folder = make_sentencepiece(tmp_path / "sp")
    write_json(folder / "added_tokens.json", content)
    with pytest.raises(ValueError, match=r"sp/added_tokens\.json"):
        from_hf(folder)


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1 << 70, 0.5, "", "x", "</s>", [], [1], ["</s>"], [[]], {}, {"a": 1}, {"content": "</s>"},
    {"content": 3}, {"0": {"content": "x"}}, {"a": {"content": "</s>"}},
)  # fmt: skip
NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "added_tokens_decoder",
    "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip
KNOWN = (
    *NAMED, "tokenizer_class", "auto_map", "model_max_length", "sp_model_kwargs", "add_bos_token", "add_eos_token",
    "add_prefix_space", "clean_up_tokenization_spaces", "legacy", "split_special_tokens", "fix_mistral_regex",
    "chat_template", "padding_side", "truncation_side", "model_input_names", "init_inputs",
)  # fmt: skip
OTHER = (
    "image_token",
    "processor_class",
    "backend",
    "vocab_file",
    "tokenizer_file",
    "name_or_path",
    "use_fast",
    "special",
)
TOP = (
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
)
MODEL = ("type", "dropout", "unk_token", "continuing_subword_prefix", "fuse_unk", "byte_fallback", "vocab", "merges")


def all_types() -> list[tuple[str, str, str, Any]]:
    """Kind of folder, file, field and value: every field of every file with a value of every type."""
    kinds = ("json", "model", "transformers")
    found = [(k, "tokenizer_config.json", f, v) for k in kinds for f in (*KNOWN, *OTHER) for v in VALUES]
    found += [(k, "special_tokens_map.json", f, v) for k in kinds for f in NAMED for v in VALUES]
    found += [(k, "added_tokens.json", f, v) for k in kinds for f in ("", "<s>", "new") for v in VALUES]
    return found + [("json", "tokenizer.json", f, v) for f in (*TOP, *MODEL) for v in VALUES]


def check_types(tmp_path: Path, cases: list[tuple[str, str, str, Any]]) -> None:
    """Each case loads and encodes, or is refused in a sentence that names the file and what is known of it."""
    model = byte_level_tokenizer()
    good = json.loads(model.to_str())
    folders = {"json": make_folder(tmp_path / "json", model), "model": make_sentencepiece(tmp_path / "model")}
    folders["transformers"] = make_folder(tmp_path / "transformers", model)
    for kind, file, field, value in cases:
        folder = folders[kind]
        extra = {"additional_special_tokens": ["<new>"]} if kind == "transformers" else {}
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "tokenizer_config.json", SETTINGS | extra)
        if file == "tokenizer.json":
            write_json(
                folder / file, good | ({field: value} if field in TOP else {"model": good["model"] | {field: value}})
            )
        else:
            write_json(folder / file, (SETTINGS | extra if file == "tokenizer_config.json" else {}) | {field: value})
        try:
            assert from_hf(folder).tokenize("The a")
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), (kind, file, field, value)
            # what only transformers rejects is reported in its words
            if "transformers cannot" not in str(error) and (file, field) != ("tokenizer_config.json", "auto_map"):
                assert file in str(error) or "no eos_token" in str(error), (kind, field, value, str(error))
                assert file in ("tokenizer.json", "added_tokens.json") or field in str(error), (kind, field, value)
        if file == "tokenizer.json":
            write_json(folder / file, good)


def test_types_of_some_fields(tmp_path: Path) -> None:
    check_types(tmp_path, random.Random(3).sample(all_types(), 250))


@pytest.mark.slow
def test_every_type_of_every_field(tmp_path: Path) -> None:
    check_types(tmp_path, all_types())


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"no protobuf", b"\xef\xbb\xbf{}", bytes(1000), b"\x0a\x03\x0a\x01\xff"]
)
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_damaged_models_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        from_hf(tmp_path)


def test_a_half_of_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "t", byte_level_tokenizer(), eos_token="\ud800")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has half of a surrogate pair"):
        from_hf(folder)


def test_ids_beyond_any_vocabulary_are_named(tmp_path: Path) -> None:
    model = byte_level_tokenizer()
    content = json.loads(model.to_str())
    content["model"]["vocab"]["far"] = 1 << 31
    folder = make_folder(tmp_path / "t", model)
    write_json(folder / "tokenizer.json", content)
    with pytest.raises(ValueError, match=r"tokenizer\.json has token ids up to 2147483648"):
        from_hf(folder)


def test_damage_of_a_configuration_is_a_sentence(tmp_path: Path) -> None:
    folder, generator = make_sentencepiece(tmp_path / "sp"), random.Random(11)
    values = (None, -1, 0, 2, 1 << 70, 0.5, True, "", "</s>", "x", [], [1], {}, {"content": "</s>"}, {"content": 3})
    good = SETTINGS | {"added_tokens_decoder": {"2": {"content": "</s>"}}, "additional_special_tokens": []}
    for _ in range(300):
        content = json.loads(json.dumps(good))
        place = content if generator.random() < 0.7 else content["added_tokens_decoder"]
        place[generator.choice(list(place))] = generator.choice(values)
        write_json(folder / "tokenizer_config.json", content)
        try:
            assert from_hf(folder).tokenize("a")
        except ValueError as error:
            assert str(folder) in str(error)
