"""Blends, splits and the builder: what --data-path and --split mean, and what is refused in words."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from megatron.core.config import DataConfig
from megatron.core.datasets.blended_dataset import (
    BlendedDataset,
    blend_summary,
    build_train_valid_test_datasets,
    fingerprints,
    source_table,
)
from megatron.core.datasets.description import DatasetDescription, file_sha256
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter

IDENTITY = {"type": "Numbers", "vocab_size": 1000, "eod": 999, "sha256": {}}


@dataclass(frozen=True)
class Vocabulary:
    vocab_size: int = 1000
    eod: int = 999
    identity: dict = field(default_factory=lambda: IDENTITY)


def write_constant(prefix: Path, token: int, documents: int, length: int = 20, dtype: str = "uint16") -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for _ in range(documents):
            writer.add_document([token] * length)
        writer.finalize()
    return str(prefix)


def build(
    tmp_path: Path, data_path: tuple[str, ...], num_samples=(100, 20, 10), split="80,20", vocabulary=Vocabulary()
):
    config = DataConfig(seq_length=8, data_path=data_path, split=split, data_cache_path=str(tmp_path / "cache"))
    return build_train_valid_test_datasets(config, num_samples, 7, vocabulary)


def sources(dataset) -> Counter[int]:
    return Counter(int(dataset[i]["tokens"][0]) for i in range(len(dataset)))


def test_a_weighted_blend_takes_its_shares_from_each_split(tmp_path: Path) -> None:
    small, large = write_constant(tmp_path / "small", 1, 10), write_constant(tmp_path / "large", 2, 1000)
    train, valid, test = build(tmp_path, ("0.6", small, "0.4", large), split="50,30,20")
    for dataset, count in ((train, 100), (valid, 20), (test, 10)):
        assert isinstance(dataset, BlendedDataset) and len(dataset) == count
        assert sources(dataset) == {1: 0.6 * count, 2: 0.4 * count}
    rows = blend_summary(train)
    assert [(row.prefix, row.weight, row.tokens) for row in rows] == [(small, 0.6, 100), (large, 0.4, 10000)]
    assert [row.epochs for row in rows] == pytest.approx([60 * 8 / 100, 40 * 8 / 10000])


def test_an_unweighted_blend_reads_all_data_sets_equally_often(tmp_path: Path) -> None:
    """In proportion to tokens, not to documents and not one to one."""
    short = write_constant(tmp_path / "short", 1, 100, length=10)
    long = write_constant(tmp_path / "long", 2, 50, length=60)
    train, _, _ = build(tmp_path, (short, long), num_samples=(400, 0, 0), split="100")
    assert sources(train) == {1: 100, 2: 300}
    assert [row.epochs for row in blend_summary(train)] == pytest.approx([0.8, 0.8])


def test_a_weight_of_zero_leaves_a_data_set_out(tmp_path: Path) -> None:
    a, b = write_constant(tmp_path / "a", 1, 10), write_constant(tmp_path / "b", 2, 10)
    train, _, _ = build(tmp_path, ("0", a, "1", b))
    assert sources(train) == {2: 100} and [row.prefix for row in blend_summary(train)] == [b]


def test_a_data_set_too_rare_for_the_run_does_no_harm(tmp_path: Path) -> None:
    a, b = write_constant(tmp_path / "a", 1, 10), write_constant(tmp_path / "b", 2, 10)
    train, _, _ = build(tmp_path, ("1", a, "1e-9", b))
    assert sources(train) == {1: 100} or sources(train) == {1: 99, 2: 1}


def test_no_share_and_no_samples_give_none(tmp_path: Path) -> None:
    prefix = write_constant(tmp_path / "a", 1, 10)
    train, valid, test = build(tmp_path, (prefix,), num_samples=(5, 0, 5))
    assert len(train) == 5 and valid is None and test is None
    assert blend_summary(valid) == []


def test_too_few_documents_for_a_small_share(tmp_path: Path) -> None:
    few, many = write_constant(tmp_path / "few", 1, 3), write_constant(tmp_path / "many", 2, 100)
    train, valid, _ = build(tmp_path, (few,), split="969,30,1")
    assert sources(train) == {1: 100} and valid is None
    train, valid, _ = build(tmp_path, ("0.5", few, "0.5", many), split="90,10")
    assert sources(train) == {1: 50, 2: 50} and sources(valid) == {2: 20}
    with pytest.raises(ValueError, match=r"no documents of .*few for training"):
        build(tmp_path, (few,), split="1,99")


def test_splits_do_not_overlap(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        for document in range(100):
            writer.add_document([document] * 10)
        writer.finalize()
    seen = [
        {int(token) for i in range(len(dataset)) for token in dataset[i]["tokens"]}
        for dataset in build(tmp_path, (str(tmp_path / "a"),), num_samples=(200, 100, 100), split="60,25,15")
    ]
    assert seen == [set(range(60)), set(range(60, 85)), set(range(85, 100))]


def test_every_process_gets_the_same_samples_from_the_cache(tmp_path: Path) -> None:
    a, b = write_constant(tmp_path / "a", 1, 10), write_constant(tmp_path / "b", 2, 30)
    first, second = (build(tmp_path, ("0.3", a, "0.7", b))[0] for _ in range(2))
    for i in range(100):
        assert all(np.array_equal(first[i][key], second[i][key]) for key in first[i])


def test_the_cache_is_next_to_the_first_data_set_by_default(tmp_path: Path) -> None:
    prefix = write_constant(tmp_path / "data" / "a", 1, 10)
    build_train_valid_test_datasets(DataConfig(seq_length=8, data_path=(prefix,)), (5, 0, 0), 1, Vocabulary())
    assert list((tmp_path / "data" / "cache").glob("*.index"))


def test_names_of_files_stand_for_their_prefix(tmp_path: Path) -> None:
    prefix = write_constant(tmp_path / "a", 1, 10)
    assert (
        sources(build(tmp_path, (prefix + ".bin",))[0]) == sources(build(tmp_path, (prefix + ".idx",))[0]) == {1: 100}
    )


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    prefix = write_constant(tmp_path / "a", 600, 10)
    assert build(tmp_path, (prefix,), vocabulary=Vocabulary(601))[0] is not None
    with pytest.raises(ValueError, match=r"a\.bin has token ids up to 600, outside the vocabulary of 600"):
        build(tmp_path, (prefix,), vocabulary=Vocabulary(600))
    negative = write_constant(tmp_path / "n", -1, 10, dtype="int32")
    with pytest.raises(ValueError, match=r"n\.bin"):
        build(tmp_path, (negative,))


def test_floating_tokens_are_refused(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "f", "float32") as writer:
        writer.add_document(np.ones(5, np.float32))
        writer.finalize()
    with pytest.raises(ValueError, match="float32"):
        build(tmp_path, (str(tmp_path / "f"),))


def describe(prefix: str, **changes) -> None:
    indexed = IndexedDataset(prefix)
    description = DatasetDescription(
        key="text",
        tokenizer=IDENTITY | {"bos": None},
        append_eod=True,
        append_bos=False,
        documents=indexed.document_count,
        tokens=indexed.token_count,
        dtype="uint16",
        sha256={"bin": file_sha256(f"{prefix}.bin"), "idx": file_sha256(f"{prefix}.idx")},
    )
    replace(description, **changes).write(prefix)


def test_the_tokenizer_of_the_data_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = write_constant(tmp_path / "a", 1, 10)
    build(tmp_path, (prefix,))
    assert f"{prefix}.json does not exist" in caplog.text
    caplog.clear()
    describe(prefix)
    build(tmp_path, (prefix,))
    assert not caplog.text
    describe(prefix, tokenizer=IDENTITY | {"eod": 2})
    with pytest.raises(
        ValueError, match=r"a was made with another tokenizer .*: end-of-document id 2 in the data, 999"
    ):
        build(tmp_path, (prefix,))
    describe(prefix, tokens=3)
    with pytest.raises(ValueError, match=r"a\.json describes 10 documents of 3 uint16 tokens, but the data set has 10"):
        build(tmp_path, (prefix,))


def test_the_summary_is_a_table(tmp_path: Path) -> None:
    a, b = write_constant(tmp_path / "a", 1, 10), write_constant(tmp_path / "long_name", 2, 1000)
    train, _, _ = build(tmp_path, ("0.25", a, "0.75", b), split="100")
    lines = source_table(blend_summary(train)).splitlines()
    assert [line.split() for line in lines] == [
        ["source", "weight", "tokens", "epochs"],
        [a, "25.00%", "200", "1.00"],
        [b, "75.00%", "20,000", "0.03"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_fingerprints_are_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_constant(tmp_path / "a", 1, 10)
    first = fingerprints(build(tmp_path, (prefix,))[0])
    assert list(first) == [prefix] and fingerprints(build(tmp_path, (prefix + ".bin",))[0]) == first
    raw = bytearray((tmp_path / "a.bin").read_bytes())
    (tmp_path / "a.bin").write_bytes(raw)
    assert fingerprints(build(tmp_path, (prefix,))[0]) == first
    describe(prefix)
    described = fingerprints(build(tmp_path, (prefix,))[0])
    assert described == first | {f"{prefix}.json": file_sha256(f"{prefix}.bin")}
    raw[200] ^= 1
    (tmp_path / "a.bin").write_bytes(raw)
    assert fingerprints(build(tmp_path, (prefix,))[0])[prefix] != first[prefix]


def test_fingerprints_of_large_files_look_at_pieces_all_over(tmp_path: Path) -> None:
    prefix = write_constant(tmp_path / "a", 1, 400, length=10_000)
    first = IndexedDataset(prefix).fingerprint
    raw = bytearray((tmp_path / "a.bin").read_bytes())
    for start in range(0, len(raw), len(raw) // 20):
        changed = bytearray(raw)
        changed[start : start + len(raw) // 20] = b"\2\0" * (len(raw) // 40)
        (tmp_path / "a.bin").write_bytes(changed[: len(raw)])
        assert IndexedDataset(prefix).fingerprint != first, start
    for place in (0, len(raw) - 1):
        changed = bytearray(raw)
        changed[place] ^= 1
        (tmp_path / "a.bin").write_bytes(changed)
        assert IndexedDataset(prefix).fingerprint != first, place


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.idx does not exist"):
        build(tmp_path, (str(tmp_path / "nowhere"),))
    with pytest.raises(ValueError, match="--data-path"):
        build(tmp_path, ())


def test_mock_data_needs_no_files(tmp_path: Path) -> None:
    config = DataConfig(seq_length=8, mock_data=True)
    train, valid, test = build_train_valid_test_datasets(config, (4, 3, 0), 7, Vocabulary())
    assert train is not None and valid is not None and test is None
    assert len(train) == 4 and len(valid) == 3
    assert not np.array_equal(train[0]["tokens"], valid[0]["tokens"])
    assert blend_summary(train) == []


def test_what_a_killed_run_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    prefix = write_constant(tmp_path / "a", 1, 100)
    build(tmp_path, (prefix,))
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    for leftover in (".0f.index.abc.tmp", ".0f-1.index.abc.tmp"):
        (tmp_path / "cache" / leftover).touch()
    build(tmp_path, (prefix,))  # which finds all that it needs
    assert {path.name for path in (tmp_path / "cache").iterdir()} == kept
