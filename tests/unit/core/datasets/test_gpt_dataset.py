"""GPT data sets: every token of every epoch, in an order that is the seed's alone, from a cache that heals."""

import errno
import logging
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset, SampleFormat, make_sample
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter

SEQ_LENGTH = 8


def write_numbered(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Documents whose tokens are 0, 1, 2, ... throughout, so that a token tells its place."""
    with IndexedDatasetWriter(prefix, "int32") as writer:
        start = 0
        for length in lengths:
            writer.add_document(np.arange(start, start + length))
            start += length
        writer.finalize()
    return IndexedDataset(prefix)


@pytest.fixture
def indexed(tmp_path: Path) -> IndexedDataset:
    random = np.random.default_rng(3)
    return write_numbered(tmp_path / "numbers", [0, *random.integers(1, 30, 40).tolist(), 1, 1, 0])


def gpt(indexed: IndexedDataset, num_samples: int, seed: int = 1, cache: Path | None = None, **options) -> GPTDataset:
    documents = options.pop("documents", (0, indexed.document_count))
    return GPTDataset(indexed, documents, num_samples, SEQ_LENGTH, seed, "train", cache, **options)


def stream(dataset: GPTDataset, samples: int) -> list[int]:
    """Tokens of the first samples, put back into the order before shuffling, without the shared ones."""
    order = np.argsort(dataset.shuffle_index[:samples])
    items = [dataset[int(i)] for i in order]
    return [token for item in items for token in item["tokens"].tolist()] + items[-1]["labels"][-1:].tolist()


def test_samples_are_shifted_pairs_of_the_promised_types(indexed: IndexedDataset) -> None:
    for item in map(gpt(indexed, 40).__getitem__, range(40)):
        assert item["tokens"].shape == item["labels"].shape == item["loss_mask"].shape == (SEQ_LENGTH,)
        assert item["tokens"].dtype == item["labels"].dtype == np.int64 and item["loss_mask"].dtype == np.float32
        assert np.array_equal(item["tokens"][1:], item["labels"][:-1])
        assert item["loss_mask"].tolist() == [1] * SEQ_LENGTH


def test_every_epoch_has_every_token_once_before_the_next_begins(indexed: IndexedDataset) -> None:
    tokens = indexed.token_count
    per_epoch = tokens / SEQ_LENGTH
    dataset = gpt(indexed, int(3 * per_epoch))
    assert dataset.num_epochs == 3
    for epochs in (1, 2):
        inside = (epochs * tokens - 1) // SEQ_LENGTH
        counts = Counter(stream(dataset, inside))
        # The few tokens after the last whole sample of an epoch come with the first sample of the next.
        assert set(counts.values()) <= {epochs - 1, epochs} and min(counts.values()) >= epochs - 1
        assert sum(count == epochs for count in counts.values()) >= tokens - SEQ_LENGTH
    whole = stream(dataset, len(dataset))
    for epoch in range(2):
        assert sorted(whole[epoch * tokens : (epoch + 1) * tokens]) == list(range(tokens))
    assert whole[:tokens] != whole[tokens : 2 * tokens]


def test_documents_stay_in_one_piece(indexed: IndexedDataset) -> None:
    tokens = indexed.token_count
    whole = stream(gpt(indexed, tokens // SEQ_LENGTH + 2), (tokens - 1) // SEQ_LENGTH)
    place = {token: position for position, token in enumerate(whole)}
    for document in range(indexed.document_count):
        positions = [place[token] for token in indexed.get_document(document).tolist() if token in place]
        assert positions == list(range(positions[0], positions[0] + len(positions))) if positions else True


def test_the_order_depends_on_the_seed_and_the_sample_alone(indexed: IndexedDataset) -> None:
    short, same, long, other = gpt(indexed, 30), gpt(indexed, 30), gpt(indexed, 500), gpt(indexed, 30, seed=2)
    tokens = [[tuple(dataset[i]["tokens"]) for i in range(30)] for dataset in (short, same, long, other)]
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3]
    assert np.any(np.diff(short.shuffle_index) != 1) and np.any(np.diff(short.document_index) != 1)


def test_the_order_is_this_one_in_every_version() -> None:
    """A changed order would make a resumed run read other samples than it should."""
    dataset = MockGPTDataset(1000, 4, 10, seed=5)
    assert [dataset[i]["tokens"].tolist() for i in (0, 9)] == [[184, 186, 188, 190], [615, 617, 619, 621]]


def test_the_shuffle_is_this_one_in_every_version(tmp_path: Path) -> None:
    dataset = gpt(write_numbered(tmp_path / "a", [9] * 6), 6, seed=5)
    assert dataset.document_index.tolist() == [4, 2, 5, 3, 1, 0]
    assert dataset.shuffle_index.tolist() == [4, 2, 1, 3, 0, 5]


def test_a_split_reads_its_own_documents_only(indexed: IndexedDataset) -> None:
    first = int(indexed.document_lengths(0, 10).sum())
    last = first + int(indexed.document_lengths(10, 20).sum())
    dataset = gpt(indexed, 60, documents=(10, 20))
    seen = {token for i in range(60) for token in dataset[i]["tokens"].tolist()}
    assert seen == set(range(first, last))


def test_a_data_set_shorter_than_a_sample_repeats(tmp_path: Path) -> None:
    dataset = gpt(write_numbered(tmp_path / "a", [3]), 5)
    for i in range(5):
        item = dataset[i]
        assert np.array_equal(item["labels"], (item["tokens"] + 1) % 3)


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    write_numbered(prefix, [2, 3, 4, 1])
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[26:34] = (3).to_bytes(8, "little")
    (tmp_path / "a.idx").write_bytes(raw[:-40] + np.array([0, 2, 4], "<i8").tobytes())
    dataset = gpt(IndexedDataset(prefix), 1)
    assert sorted(dataset.document_index.tolist()) == [0, 1]
    assert stream(dataset, 1) in ([*range(10)][:9], [5, 6, 7, 8, 9, 0, 1, 2, 3])


def test_eod_is_masked_where_it_is_the_input(indexed: IndexedDataset) -> None:
    masked = gpt(indexed, 100, sample_format=SampleFormat(eod_token=17, eod_mask_loss=True))
    plain = gpt(indexed, 100, sample_format=SampleFormat(eod_token=17))
    assert any(17 in masked[i]["tokens"] for i in range(100))
    for i in range(100):
        assert np.array_equal(masked[i]["loss_mask"], (masked[i]["tokens"] != 17).astype(np.float32))
        assert plain[i]["loss_mask"].all()


def test_a_token_outside_the_vocabulary_is_refused_when_read(indexed: IndexedDataset) -> None:
    tokens = indexed.token_count
    dataset = gpt(indexed, tokens // SEQ_LENGTH, vocab_size=tokens - 1)
    with pytest.raises(ValueError, match=f"token id {tokens - 1}, which is outside the vocabulary"):
        for i in range(len(dataset)):
            dataset[i]


def test_a_data_set_absurdly_small_for_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 3 tokens, which 1000000 samples of 8 tokens would read 2666667 times"):
        gpt(write_numbered(tmp_path / "a", [3]), 1_000_000)


def test_no_tokens_and_no_such_sample_are_refused(indexed: IndexedDataset) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        gpt(indexed, 1, documents=(0, 1))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            gpt(indexed, 3)[index]


def all_tokens(dataset: GPTDataset) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]


def test_a_second_run_reads_the_cache(indexed: IndexedDataset, tmp_path: Path, monkeypatch) -> None:
    expected = all_tokens(gpt(indexed, 50))
    assert all_tokens(gpt(indexed, 50, cache=tmp_path / "cache")) == expected
    assert not list((tmp_path / "cache").glob("*.tmp"))
    monkeypatch.setattr(GPTDataset, "_build", lambda *_: pytest.fail("built again"))
    assert all_tokens(gpt(indexed, 50, cache=tmp_path / "cache")) == expected
    assert len(all_tokens(gpt(indexed, 51, cache=tmp_path / "cache"))) == 51, "as many epochs: the same indices"


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: b"garbage",
        lambda raw: raw[:-90] + bytes([raw[-90] ^ 1]) + raw[-89:],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: b"[" + raw[1:],
    ],
)
def test_a_damaged_cache_is_built_again_under_another_name(indexed: IndexedDataset, tmp_path: Path, damage) -> None:
    """Not in place: another process may read the file."""
    cache = tmp_path / "cache"
    expected = all_tokens(gpt(indexed, 50, cache=cache))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for copies in (1, 2):
        for path in cache.iterdir():
            path.unlink()
            path.write_bytes(damage(whole))
        damaged = {path: path.stat().st_ino for path in cache.iterdir()}
        for _ in range(2):
            assert all_tokens(gpt(indexed, 50, cache=cache)) == expected
        assert all(path.stat().st_ino == inode for path, inode in damaged.items())
        (new,) = cache.iterdir() - damaged.keys()
        assert new.name == f"{file.stem}-{copies}.index" and new.read_bytes() == whole


def test_the_first_file_of_a_name_stays(indexed: IndexedDataset, tmp_path: Path, monkeypatch) -> None:
    """Another process finishes while this one builds: its file may be mapped and is not replaced."""
    cache, build = tmp_path / "cache", GPTDataset._build

    def overtaken(self, documents, put) -> None:
        monkeypatch.setattr(GPTDataset, "_build", build)
        all_tokens(gpt(indexed, 50, cache=cache))
        build(self, documents, put)

    expected, inodes = all_tokens(gpt(indexed, 50)), []
    monkeypatch.setattr(GPTDataset, "_build", overtaken)
    link = os.link
    monkeypatch.setattr(os, "link", lambda a, b: inodes.append(os.stat(a).st_ino) or link(a, b))
    assert all_tokens(gpt(indexed, 50, cache=cache)) == expected
    (file,) = cache.iterdir()
    assert len(inodes) == 2 and file.stat().st_ino == inodes[0]


def test_file_systems_without_hard_links_do_too(indexed: IndexedDataset, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    assert all_tokens(gpt(indexed, 50, cache=tmp_path / "cache")) == all_tokens(gpt(indexed, 50))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".index"]


def test_a_mistake_in_the_data_is_no_damage_of_the_cache(indexed: IndexedDataset, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a document is too long")

    monkeypatch.setattr(IndexedDataset, "document_lengths", fail)
    with pytest.raises(ValueError, match="too long"):
        gpt(indexed, 50, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_everything_the_order_depends_on_is_in_the_name(indexed: IndexedDataset, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    lengths = indexed.document_lengths(0, indexed.document_count)[::-1].tolist()
    rewritten = write_numbered(tmp_path / "elsewhere" / "numbers", lengths)
    count = indexed.document_count
    variants = [
        (indexed, (0, count), 50, SEQ_LENGTH, 1),
        (indexed, (0, count), 500, SEQ_LENGTH, 1),
        (indexed, (0, count), 50, SEQ_LENGTH + 1, 1),
        (indexed, (0, count), 50, SEQ_LENGTH, 2),
        (indexed, (1, count), 50, SEQ_LENGTH, 1),
        (rewritten, (0, count), 50, SEQ_LENGTH, 1),
    ]
    for round_ in range(2):
        for variant in variants:
            cached = GPTDataset(*variant, "train", cache)
            assert all_tokens(cached) == all_tokens(GPTDataset(*variant, "train", None)), (round_, variant)
    assert len(list(cache.glob("*.index"))) == len(variants)


def test_a_cache_folder_that_cannot_be_written_is_done_without(
    indexed: IndexedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert all_tokens(gpt(indexed, 50, cache=tmp_path / "file")) == all_tokens(gpt(indexed, 50))
    assert "stay in memory" in caplog.text


def _build_and_report(prefix: str, cache: Path, start, results) -> None:
    start.wait()
    dataset = gpt(IndexedDataset(prefix), 300, cache=cache)
    results.put(str(all_tokens(dataset)[::7]))


def test_many_processes_build_one_cache_at_once(indexed: IndexedDataset, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    arguments = (indexed.prefix, tmp_path / "cache", start, results)
    workers = [context.Process(target=_build_and_report, args=arguments) for _ in range(6)]
    for worker in workers:
        worker.start()
    start.set()
    answers = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert answers == {str(all_tokens(gpt(indexed, 300))[::7])}
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_mock_samples_depend_on_seed_and_number_alone() -> None:
    short, long, other = MockGPTDataset(50, 16, 3, 1), MockGPTDataset(50, 16, 9, 1), MockGPTDataset(50, 16, 3, 2)
    for i in range(3):
        tokens = short[i]["tokens"]
        assert np.array_equal(tokens, long[i]["tokens"]) and not np.array_equal(tokens, other[i]["tokens"])
        assert tokens.min() >= 0 and tokens.max() < 50 and np.array_equal(tokens[1:], short[i]["labels"][:-1])
    assert not np.array_equal(short[0]["tokens"], short[1]["tokens"])


def test_samples_know_their_documents(indexed: IndexedDataset) -> None:
    """Tokens number the corpus, so that a token tells its document; here no token is an EOD."""
    kind = SampleFormat(reset_position_ids=True, reset_attention_mask=True)
    starts = np.cumsum([0, *indexed.document_lengths(0, indexed.document_count)])
    dataset, single = gpt(indexed, 150, sample_format=kind), 0
    for i in range(150):
        sample = dataset[i]
        document = np.searchsorted(starts, sample["tokens"], side="right")
        begins = [0, *(np.flatnonzero(np.diff(document)) + 1).tolist()]
        assert sample["document_lengths"].tolist() == np.diff([*begins, SEQ_LENGTH]).tolist()
        assert sample["document_lengths"].dtype == np.int32 and sample["position_ids"].dtype == np.int64
        expected = np.concatenate([np.arange(length) for length in sample["document_lengths"]])
        assert np.array_equal(sample["position_ids"], expected)
        single += len(begins) == 1
    assert 0 < single < 150


def test_a_document_ends_after_an_eod() -> None:
    kind = SampleFormat(eod_token=9, reset_position_ids=True, reset_attention_mask=True)
    cases = [
        ([1, 2, 9, 3, 4, 5], [6], [3, 2]),
        ([9, 9, 1, 9, 2, 9], [6], [1, 1, 2, 1]),
        ([1, 2, 3, 4, 9, 5], [5, 1], [5]),
        ([1, 2, 3, 4, 5, 9], [6], [5]),
        ([1, 9, 3, 4, 5, 9], [2, 0, 2, 2], [2, 2, 1]),
    ]
    for tokens, stored, lengths in cases:
        sample = make_sample(np.array(tokens), kind, stored)
        assert sample["document_lengths"].tolist() == lengths, tokens
        assert sample["position_ids"].tolist() == [k for length in lengths for k in range(length)]
    assert make_sample(np.array(cases[0][0]), SampleFormat(eod_token=9)).keys() == {"tokens", "labels", "loss_mask"}
