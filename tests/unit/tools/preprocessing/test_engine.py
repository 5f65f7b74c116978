"""Engines give exactly the reference's ids, and one that does not is not taken."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import Tokenizer, build_tokenizer
from megatron.core.tokenizers.transformers_tokenizer import TransformersTokenizer
from tools import preprocess_data
from tools.preprocessing import engine, inputs, run
from tools.preprocessing.engine import EngineUnavailable, engine_source, first_difference, make_engine, reference_name
from tools.preprocessing.settings import TokenizerFlags
from tools.preprocessing.vocabulary import sentencepiece_json

pytest.importorskip("gigatoken")


def build(kind: str, request: pytest.FixtureRequest) -> Tokenizer:
    if kind == "mixtral":
        model = request.getfixturevalue("mixtral_model")
        return build_tokenizer(TokenizerFlags(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(model)))
    if kind == "sentencepiece":
        folder = request.getfixturevalue("sentencepiece_model")
        return build_tokenizer(TokenizerFlags(tokenizer_type="PretrainedTokenizerFromHF", tokenizer_model=str(folder)))
    folder = request.getfixturevalue("byte_level_folder")
    if kind == "gpt2":
        files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
        return build_tokenizer(TokenizerFlags(tokenizer_type="GPT2BPETokenizer", **files))
    return build_tokenizer(TokenizerFlags(tokenizer_type="PretrainedTokenizerFromHF", tokenizer_model=str(folder)))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("mixtral", "gigatoken"), ("sentencepiece", "gigatoken"), ("byte level", "gigatoken"), ("gpt2", "gigatoken"),
     ("gpt2", "hf")],
)  # fmt: skip
def test_ids_are_the_references(kind: str, name: str, nasty_strings: list[str], request) -> None:
    tokenizer = build(kind, request)
    # The library's Unicode tables differ on letters that became letters in 2025: these must be in what is compared.
    assert any("\U000331ff's" in text for text in nasty_strings)
    fast = make_engine(name, tokenizer, engine_source(name, tokenizer))
    expected = tokenizer.tokenize_batch(nasty_strings)
    found = fast.encode_batch(nasty_strings)
    wrong = [text for text, a, b in zip(nasty_strings, expected, found) if a != [int(token) for token in b]]
    assert wrong == []
    assert first_difference(fast, tokenizer, engine.PROBES) is None


def test_a_restarted_engine_gives_the_same_ids(nasty_strings: list[str], request) -> None:
    tokenizer = build("sentencepiece", request)
    fast = make_engine("gigatoken", tokenizer, engine_source("gigatoken", tokenizer))
    before = [ids.tolist() for ids in fast.encode_batch(nasty_strings[:100])]
    fast.restart()  # type: ignore[attr-defined]
    assert [ids.tolist() for ids in fast.encode_batch(nasty_strings[:100])] == before


def test_only_steps_count_as_looking_at_unicode_classes(mixtral_model: Path, byte_level_folder: Path) -> None:
    """Mixtral's vocabulary has an entry "Regex", which is no pattern."""
    flags = TokenizerFlags(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(mixtral_model))
    source = engine_source("gigatoken", build_tokenizer(flags))
    assert source is not None and '"Regex": ' in source and not engine.has_classes(source)
    assert engine.has_classes('{"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}}}')
    assert engine.has_classes('{"normalizer": {"type": "Replace", "pattern": {"Regex": "a"}}}')
    assert engine.has_classes('{"normalizer": {"type": "NFKC"}, "model": {"type": "BPE"}}')
    assert engine.has_classes((byte_level_folder / "tokenizer.json").read_text())


def test_what_cannot_run_says_why(request) -> None:
    for kind, name, reason in (
        ("sentencepiece", "hf", "gives other ids"),
        ("byte level", "sentencepiece", "no tokenizer.model"),
        ("gpt2", "sentencepiece", "no tokenizer.model"),
    ):
        with pytest.raises(EngineUnavailable, match=reason):
            engine_source(name, build(kind, request))
    null = build_tokenizer(TokenizerFlags(tokenizer_type="NullTokenizer"), 10)
    with pytest.raises(EngineUnavailable, match="cannot run a tokenizer of type NullTokenizer"):
        engine_source("gigatoken", null)
    assert [reference_name(build(kind, request)) for kind in ("sentencepiece", "byte level", "gpt2")] == [
        "sentencepiece", "hf", "reference",
    ]  # fmt: skip


def corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def command(tmp_path: Path, sentencepiece_model: Path) -> Callable[..., list[str]]:
    def build_command(source: Path, *more: str) -> list[str]:
        return [
            "--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "Llama2Tokenizer",
            "--tokenizer-model", str(sentencepiece_model / "tokenizer.model"), "--workers", "1", *more,
        ]  # fmt: skip

    return build_command


class Wrong:
    """An engine that is right but for texts with "zebra" in them."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: list[str]) -> list[Any]:
        return [
            ids[::-1] if "zebra" in text else ids for text, ids in zip(texts, self._tokenizer.tokenize_batch(texts))
        ]


@pytest.fixture
def wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, reference: Tokenizer, source: str | None) -> engine.Engine:
        return Wrong(reference) if name == "gigatoken" else make_engine(name, reference, source)

    monkeypatch.setattr(run, "make_engine", make)


def stored(tmp_path: Path) -> list[list[int]]:
    indexed = IndexedDataset(tmp_path / "out_text_document")
    return [indexed[i].tolist() for i in range(len(indexed))]


def test_a_wrong_engine_is_not_taken(tmp_path: Path, command, wrong_engine, capsys, request) -> None:
    texts = ["one zebra", "two horses"]
    source = corpus(tmp_path / "a.jsonl", texts)
    assert preprocess_data.main(command(source, "--tokenizer-backend", "gigatoken")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --tokenizer-backend gigatoken: it gives other ids than the reference on a sample")
    assert not list(tmp_path.glob("out*"))
    assert preprocess_data.main(command(source)) == 0
    output = capsys.readouterr().out
    assert "not using gigatoken: it gives other ids" in output and "(engine sentencepiece," in output
    assert stored(tmp_path) == build("sentencepiece", request).tokenize_batch(texts)


def test_a_difference_on_the_way_stops_or_starts_again(
    tmp_path: Path, command, wrong_engine, capsys, request, monkeypatch
) -> None:
    """The sample sees the beginnings of a few documents; here every document goes wrong only late."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 30_000)
    draw = random.Random(1)
    texts = [" ".join(draw.choices(["a", "horse", "of", "course"], k=2000)) + " zebra" * 2000 for _ in range(40)]
    source = corpus(tmp_path / "a.jsonl", texts)
    assert preprocess_data.main(command(source, "--tokenizer-backend", "gigatoken")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a.jsonl, bytes " in error and "the reference" in error and "nothing that gigatoken wrote" in error
    assert not list(tmp_path.glob("out*"))
    assert preprocess_data.main(command(source)) == 0
    output = capsys.readouterr().out
    assert "warning:" in output and "starting again from the beginning with the reference tokenizer" in output
    assert "(engine sentencepiece," in output
    assert stored(tmp_path) == build("sentencepiece", request).tokenize_batch(texts)


def test_every_backend_writes_the_same_bytes(tmp_path: Path, byte_level_folder: Path, nasty_strings) -> None:
    source = corpus(tmp_path / "a.jsonl", nasty_strings[:3000])
    written = []
    for backend in ("gigatoken", "hf", "auto"):
        prefix = tmp_path / backend
        command = [
            "--input", str(source), "--output-prefix", str(prefix), "--tokenizer-type", "PretrainedTokenizerFromHF",
            "--tokenizer-model", str(byte_level_folder), "--workers", "1", "--append-eod", "--append-bos",
            "--tokenizer-backend", backend,
        ]  # fmt: skip
        assert preprocess_data.main(command) == 0
        written.append([Path(f"{prefix}_text_document.{end}").read_bytes() for end in ("bin", "idx", "json")])
    assert written[0] == written[1] == written[2]


@pytest.fixture
def chat_folder(tmp_path: Path, byte_level_folder: Path) -> Path:
    """A folder whose added token only its configuration knows, so that transformers has to put it together."""
    folder = tmp_path / "chat"
    shutil.copytree(byte_level_folder, folder)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def large_folder(tmp_path: Path, byte_level_folder: Path) -> Path:
    """A folder with more entries than transformers leaves alone, and a mark of Windows editors in front."""
    folder = tmp_path / "large"
    shutil.copytree(byte_level_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"unreached {number}": number for number in range(len(vocabulary), 100_100)}
    (folder / "tokenizer.json").write_text("\ufeff" + json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["chat_folder", "large_folder"])
def test_what_transformers_puts_together_runs_in_gigatoken(
    tmp_path: Path, kind: str, nasty_strings: list[str], request, capsys
) -> None:
    folder = request.getfixturevalue(kind)
    flags = TokenizerFlags(tokenizer_type="PretrainedTokenizerFromHF", tokenizer_model=str(folder))
    tokenizer = build_tokenizer(flags)
    assert isinstance(tokenizer, TransformersTokenizer)
    texts = [*nasty_strings[:300], "a<|im_end|>b <|im_end|>"]
    command = [
        "--input", str(corpus(tmp_path / "a.jsonl", texts)), "--output-prefix", str(tmp_path / "out"),
        "--tokenizer-type", "PretrainedTokenizerFromHF", "--tokenizer-model", str(folder), "--workers", "1",
    ]  # fmt: skip
    assert preprocess_data.main(command) == 0
    assert "(engine gigatoken," in capsys.readouterr().out
    assert stored(tmp_path) == [ids for ids in tokenizer.tokenize_batch(texts) if ids]
    assert (tokenizer.vocab_size - 1 in stored(tmp_path)[-1]) == (kind == "chat_folder")


def with_added(folder: Path, *tokens: dict[str, Any]) -> Tokenizer:
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    content["added_tokens"] += [{"id": 800 + number, **flags, **token} for number, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    flags_of = TokenizerFlags(tokenizer_type="PretrainedTokenizerFromHF", tokenizer_model=str(folder))
    return build_tokenizer(flags_of)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([{"content": "horse", "single_word": True}], "'horse' is single_word"),
        ([{"content": "tail ", "rstrip": True}, {"content": " lead"}], "'tail ' is rstrip, and others begin with"),
        ([{"content": "tail ", "rstrip": True}, {"content": "lead"}], None),
        ([{"content": " tail", "lstrip": True, "normalized": True}, {"content": " lead", "special": True}], None),
    ],
)
def test_added_tokens_that_gigatoken_ignores_are_left_to_the_reference(
    tmp_path: Path, byte_level_folder: Path, tokens: list[dict[str, Any]], reason: str | None
) -> None:
    tokenizer = with_added(Path(shutil.copytree(byte_level_folder, tmp_path / "t")), *tokens)
    source = engine_source("gigatoken", tokenizer)
    if reason is None:
        fast = make_engine("gigatoken", tokenizer, source)
        assert first_difference(fast, tokenizer, engine.probes(tokenizer, source)) is None
    else:
        with pytest.raises(EngineUnavailable, match=reason):
            make_engine("gigatoken", tokenizer, source)


def test_probes_try_every_added_token(tmp_path: Path, byte_level_folder: Path) -> None:
    """An engine that does not know the last of many added tokens, and is right otherwise."""
    marks = [{"content": f"<mark {number}>"} for number in range(61)]
    folders = [Path(shutil.copytree(byte_level_folder, tmp_path / name)) for name in ("all", "lacking")]
    tokenizer, lacking = with_added(folders[0], *marks), with_added(folders[1], *marks[:-1])
    source = engine_source("gigatoken", lacking)
    fast = make_engine("gigatoken", lacking, source)
    assert first_difference(fast, tokenizer, engine.PROBES) is None
    found = first_difference(fast, tokenizer, engine.probes(tokenizer, source))
    assert found is not None and "the reference [860]" in found


def test_bos_and_eod_never_double(tmp_path: Path, byte_level_folder: Path) -> None:
    """`<s>` and `</s>` in a text are read as these tokens by this tokenizer."""
    source = corpus(tmp_path / "a.jsonl", ["<s>a</s>", "a", "<s>", "</s>", "a</s>b"])
    command = [
        "--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-type",
        "PretrainedTokenizerFromHF", "--tokenizer-model", str(byte_level_folder), "--workers", "1", "--append-eod",
        "--append-bos",
    ]  # fmt: skip
    assert preprocess_data.main(command) == 0
    a, b = (build_tokenizer(TokenizerFlags(
        tokenizer_type="PretrainedTokenizerFromHF", tokenizer_model=str(byte_level_folder))).tokenize(text)[0]
        for text in "ab")  # fmt: skip
    assert stored(tmp_path) == [[1, a, 2], [1, a, 2], [1, 2], [1, 2], [1, a, 2, b, 2]]


COUNT_THREADS = """
import os, runpy, sys
fork = os.fork
def counted():
    print("threads:", len(os.listdir("/proc/self/task")), flush=True)
    return fork()
os.fork = counted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads in /proc")
@pytest.mark.parametrize(("backend", "ranks"), [("gigatoken", 1), ("hf", 1), ("sentencepiece", 2)])
def test_a_process_that_is_forked_has_no_other_threads(
    tmp_path: Path, byte_level_folder: Path, sentencepiece_model: Path, backend: str, ranks: int
) -> None:
    """A lock that another thread holds in that moment would stay locked in the worker for ever."""
    folder = sentencepiece_model if backend == "sentencepiece" else byte_level_folder
    command = [
        sys.executable, "-c", COUNT_THREADS, str(Path(preprocess_data.__file__)), "--input",
        str(corpus(tmp_path / "a.jsonl", ["horse"])), "--output-prefix", str(tmp_path / "out"), "--tokenizer-type",
        "PretrainedTokenizerFromHF", "--tokenizer-model", str(folder), "--workers", "2", "--tokenizer-backend", backend,
        "--rank-timeout", "1",
    ]  # fmt: skip
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": str(ranks)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 or "rank 1 has not begun" in done.stderr, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("threads")] == ["threads: 1"] * 2


def test_the_models_conversion_is_gigatokens_own(mixtral_model: Path, sentencepiece_model: Path) -> None:
    """But for control pieces, which are no added tokens, and which nothing merges into."""
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    for path in (mixtral_model, sentencepiece_model / "tokenizer.model"):
        expected = json.loads(sentencepiece_to_tokenizer_json(path.read_bytes()))
        controls = {token["content"] for token in expected["added_tokens"] if token["special"]}
        assert controls
        expected["added_tokens"] = [token for token in expected["added_tokens"] if not token["special"]]
        merges = expected["model"]["merges"]
        expected["model"]["merges"] = [merge for merge in merges if "".join(merge) not in controls]
        assert json.loads(sentencepiece_json(path.read_bytes())) == expected
    for broken in (b"", b"not a model", path.read_bytes()[:-1]):
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            sentencepiece_json(broken)
