"""Folders drawn at random give the ids, the sizes and the ends of documents that transformers gives, and so do engines.

Two differences are meant: a folder of nothing but a tokenizer.model is run by sentencepiece itself, whose own special
tokens count where the configuration names none; and objects without `__type` are taken for tokens.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from folders_testing import TEXTS, draw_folder, make_bases
from test_build_tokenizer import automatic, from_hf

from megatron.core.tokenizers import Tokenizer
from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tools.preprocessing.engine import EngineUnavailable, engine_source, first_difference, make_engine, probes

_MARK = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return make_bases(tmp_path_factory.mktemp("bases"))


def expected_of(folder: Path) -> Any:
    """transformers' tokenizer of the folder without marks of Windows editors; None if there is none that ends."""
    for path in folder.glob("*.json"):
        path.write_bytes(path.read_bytes().removeprefix(_MARK))
    try:
        theirs = automatic(folder)
    except Exception:  # whatever comes of files that it did not expect
        return None
    return None if theirs.eos_token_id is None else theirs


def check_ids(ours: Tokenizer, theirs: Any, folder: Path) -> None:
    """Compares all that a tokenizer tells."""
    if isinstance(ours, SentencePieceTokenizer):
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        expected = model.encode(TEXTS)
    else:
        assert theirs is not None
        expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert ours.tokenize_batch(TEXTS) == expected
    if theirs is not None:
        assert (ours.vocab_size, ours.eod) == (1 + max(theirs.get_vocab().values()), theirs.eos_token_id)
        assert ours.bos == theirs.bos_token_id or isinstance(ours, SentencePieceTokenizer)


def check_engine(ours: Tokenizer) -> str:
    """Whether gigatoken runs it, is refused, or gives other ids, which its probes have to show."""
    try:
        source = engine_source("gigatoken", ours)
        engine = make_engine("gigatoken", ours, source)
    except EngineUnavailable:
        return "refused"
    if first_difference(engine, ours, probes(ours, source)) is not None:
        return "other ids"
    assert first_difference(engine, ours, TEXTS) is None
    return "runs"


def check_variants(tmp_path: Path, bases: dict[str, bytes], seeds: range) -> Counter[str]:
    """Compares the variants of these numbers; returns how many had which tokenizer and engine."""
    pytest.importorskip("gigatoken")
    seen: Counter[str] = Counter()
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        draw_folder(folder, bases, seed)
        ours: Tokenizer | None
        try:
            ours = from_hf(folder)
            engine = check_engine(ours)  # before the marks are taken away
        except ValueError as error:
            ours = None
            assert str(folder) in str(error) and "\n" not in str(error)
        theirs = expected_of(folder)
        try:
            if ours is None:
                assert theirs is None
                seen["none"] += 1
                continue
            check_ids(ours, theirs, folder)
            seen.update((type(ours).__name__, engine))
        except AssertionError as error:
            raise AssertionError(f"variant {seed}: {error}") from None
    return seen


def test_some_folders(tmp_path: Path, bases: dict[str, bytes]) -> None:
    seen = check_variants(tmp_path, bases, range(120))
    kinds = ("none", "SentencePieceTokenizer", "TokenizerFromJson", "TransformersTokenizer", "refused", "runs")
    assert all(seen[kind] >= 5 for kind in kinds), seen


@pytest.mark.slow
def test_two_thousand_folders(tmp_path: Path, bases: dict[str, bytes]) -> None:
    seen = check_variants(tmp_path, bases, range(1000, 3000))
    assert seen["runs"] > 500, seen
