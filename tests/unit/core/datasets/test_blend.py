"""Splits, blends and their order: what the data flags mean, and what is refused in words."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron.core.config import DataConfig
from megatron.core.datasets.blend import BlendOrder, Source, SplitBlend, parse_blend, parse_split, split_blends


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("969,30,1", (0.969, 0.03, 0.001)),
        ("3,1", (0.75, 0.25, 0)),
        ("100", (1, 0, 0)),
        ("0, 1, 1", (0, 0.5, 0.5)),
    ],
)
def test_splits_are_shares_of_their_sum(text: str, shares: tuple[float, ...]) -> None:
    assert parse_split(text) == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "nan,1", "inf,1", "-1,2", "0,0,0", "1,,1"])
def test_splits_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--split"):
        parse_split(text)


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 123457])
def test_splits_cover_all_documents_once(count: int) -> None:
    for split in (None, "969,30,1", "1,1,1", "100", "0,1", "0.1,0.2,0.7"):
        blends = split_blends(DataConfig(data_path=("a",), split=split))
        ranges = [blend.documents(count) for blend in blends if blend is not None]
        assert ranges[0][0] == 0 and ranges[-1][1] == count
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
        assert all(start <= stop for start, stop in ranges)
    default = [blend.documents(1000) for blend in split_blends(DataConfig(data_path=("a",))) if blend is not None]
    assert default == [(0, 969), (969, 999), (999, 1000)]


def test_weights_are_normalised_and_optional() -> None:
    assert parse_blend("--data-path", ["3", "a", "1", "b"]) == (Source("a", 0.75), Source("b", 0.25))
    assert parse_blend("--data-path", ["a", "b.bin"]) == (Source("a", None), Source("b", None))
    assert parse_blend("--data-path", ["1e1", "a.idx"]) == (Source("a", 1.0),)


@pytest.mark.parametrize(
    "arguments",
    [
        ["0.6", "a", "b"],
        ["0.6", "a", "0.4"],
        ["a", "0.6", "b", "0.4"],
        ["0.6", "a", "b", "c"],
        ["0.6", "0.4", "0.5", "a"],
        ["nan", "a", "1", "b"],
        ["inf", "a", "1", "b"],
        ["-0.1", "a", "1.1", "b"],
        ["0", "a", "0", "b"],
        ["0.5"],
        ["a", "a.bin"],
        ["a", "./a"],
        ["a/b", str(Path.cwd() / "a" / "c" / ".." / "b.idx")],
        ["1e308", "a", "1e308", "b"],
        ["a\0"],
        ["\x1b]0;a"],
        ["\ud800"],
        [""],
        ["a"] * 3 + ["b"] * 500_000,
    ],
)
def test_blends_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="--train-data-path") as error:
        parse_blend("--train-data-path", arguments)
    assert len(str(error.value)) < 500


def whole(*sources: Source) -> SplitBlend:
    return SplitBlend(sources, 0.0, 1.0)


def test_each_split_may_have_data_of_its_own(tmp_path: Path) -> None:
    expected = (whole(Source("a", 0.75), Source("b", 0.25)), whole(Source("c", None)), None)
    config = DataConfig(train_data_path=("3", "a", "1", "b"), valid_data_path=("c",))
    assert split_blends(config) == expected
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"train": ["3", "a", "1", "b"], "valid": ["c"]}))
    assert split_blends(DataConfig(per_split_data_args_path=str(file))) == expected


def test_a_long_list_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "blend.txt"
    file.write_text("0.6 a_text_document\n0.4\tb_text_document\n")
    same = DataConfig(data_path=("0.6", "a_text_document", "0.4", "b_text_document"), split="90,10")
    assert split_blends(DataConfig(data_args_path=str(file), split="90,10")) == split_blends(same)


@pytest.mark.parametrize(
    ("flag", "content"),
    [
        ("data_args_path", None),
        ("data_args_path", " \n"),
        ("data_args_path", "0.6 a b"),
        ("data_args_path", b"\xff\xfe"),
        ("data_args_path", '{"train": ["a"]}'),
        ("data_args_path", "a" * 5_000_000),
        ("per_split_data_args_path", '{"train": [' + "[]," * 2_000_000 + "[]]}"),
        ("per_split_data_args_path", "[" * 100_000),
        ("per_split_data_args_path", '{"train": ["a"], "train": ["b"]}'),
        ("per_split_data_args_path", '{"train": [], "valid": []}'),
        ("per_split_data_args_path", '{"train": null}'),
        ("per_split_data_args_path", '{"train": ["\\ud800"]}'),
        ("per_split_data_args_path", None),
        ("per_split_data_args_path", "{"),
        ("per_split_data_args_path", "{}"),
        ("per_split_data_args_path", "[]"),
        ("per_split_data_args_path", '{"train": "a"}'),
        ("per_split_data_args_path", '{"train": [0.5, "a"]}'),
        ("per_split_data_args_path", '{"training": ["a"]}'),
        ("per_split_data_args_path", '{"train": ["nan", "a"]}'),
    ],
)
def test_files_that_mean_nothing_are_refused(tmp_path: Path, flag: str, content: str | bytes | None) -> None:
    file = tmp_path / "list"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {file}"):
        split_blends(DataConfig(**{flag: str(file)}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_path": ("a",), "data_args_path": "f"}, "--data-args-path and --data-path exclude each other"),
        ({"data_path": ("a",), "train_data_path": ("b",)}, "--data-path and --train-data-path, --valid-data-path and"),
        ({"data_args_path": "f", "valid_data_path": ("b",)}, "exclude each other"),
        ({"per_split_data_args_path": "f", "train_data_path": ("b",)}, "exclude each other"),
        ({"data_path": ("a",), "mock_data": True}, "--data-path and --mock-data exclude each other"),
        ({"valid_data_path": ("b",)}, "need --train-data-path"),
        ({"train_data_path": ("a",), "split": "1,1"}, "--split 1,1 divides --data-path"),
        ({"per_split_data_args_path": "f", "split": "1,1"}, "--split 1,1"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def blends() -> list[list[float]]:
    random = np.random.default_rng(0)
    cases = [[1], [0.6, 0.4], [1, 1, 1], [0.9, 0.05, 0.05], [0.5, *[0.01] * 50], [1, 1e-6], [1, 1e-12]]
    cases += [random.dirichlet(np.full(int(random.integers(2, 60)), 0.3)) + 1e-9 for _ in range(60)]
    cases += [1.0 / np.arange(1, 41), 2.0 ** -np.arange(12), np.arange(1, 300)]
    return [list(np.asarray(weights) / np.sum(weights)) for weights in cases]


def test_counts_stay_by_the_weights_after_every_sample() -> None:
    worst = 0.0
    for weights in blends():
        order = BlendOrder(weights)
        counts = np.zeros(len(weights), int)
        for sample in range(700):
            source, within = order.locate(sample)
            assert within == counts[source]
            counts[source] += 1
            assert order.counts(sample + 1) == counts.tolist()
            worst = max(worst, float(np.abs(counts - np.array(weights) * (sample + 1)).max()))
    assert worst < 1.2


def test_far_samples_are_located_without_rounding() -> None:
    order = BlendOrder([0.7, 0.2, 0.1])
    far = 10**15
    counts = order.counts(far)
    assert sum(counts) == far and counts == pytest.approx([0.7 * far, 0.2 * far, 0.1 * far], abs=2)
    source, within = order.locate(far)
    assert within == counts[source]
    assert order.counts(far + 1)[source] == within + 1


def test_the_order_is_this_one_in_every_version() -> None:
    """A changed order would make a resumed run read other samples than it should."""
    order = BlendOrder([0.5, 0.3, 0.2])
    assert [order.locate(sample)[0] for sample in range(10)] == [1, 0, 2, 0, 1, 0, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["0.6 a 0.4 b"], "'0.6 a 0.4 b'"),
        (["0.6 a", "0.4 b"], "'0.6 a'"),
        (["a b"], "'a b'"),
        (["0.6", "a,", "0.4", "b"], "'a,'"),
        (["0.6,a,0.4,b"], "'0.6,a,0.4,b'"),
        (["a", "b,c"], "'b,c'"),
        (["0,6", "a", "0,4", "b"], "'0,6'"),
        (["0.6:a", "0.4:b"], "'0.6:a'"),
        (["0.6", "a;0.4", "b"], "'a;0.4'"),
        (["[0.6,", "a]"], "'[0.6,'"),
        (["0.6\n  a"], r"'0.6\n  a'"),
    ],
)
def test_words_run_together_get_a_hint(words: list[str], named: str, tmp_path: Path) -> None:
    hint = f"{re.escape(named)} is not a data set; give every weight and every data set"
    with pytest.raises(ValueError, match=f"^--data-path {hint}"):
        split_blends(DataConfig(data_path=tuple(words)))
    with pytest.raises(ValueError, match=f"^--valid-data-path {hint}"):
        split_blends(DataConfig(train_data_path=("a",), valid_data_path=tuple(words)))
    path = tmp_path / "blend.json"
    path.write_text(json.dumps({"train": words}))
    with pytest.raises(ValueError, match=f"^--per-split-data-args-path {path}: train {hint}"):
        split_blends(DataConfig(per_split_data_args_path=str(path)))


def test_a_file_of_words_with_commas_gets_the_hint_too(tmp_path: Path) -> None:
    path = tmp_path / "blend.txt"
    path.write_text("0.6 a,\n0.4 b\n")
    with pytest.raises(ValueError, match=f"^--data-args-path {path}: 'a,' is not a data set; give every weight"):
        split_blends(DataConfig(data_args_path=str(path)))


def test_names_with_spaces_and_commas_are_data_sets_if_they_are_there(tmp_path: Path) -> None:
    prefix = str(tmp_path / "1,5 million; of 2_text_document")
    Path(f"{prefix}.idx").touch()
    assert [source.prefix for source in parse_blend("--data-path", ["3", f"{prefix}.bin", "1", "b"])] == [prefix, "b"]


def test_an_empty_word_is_said_to_be_one() -> None:
    with pytest.raises(ValueError, match=r"--data-path has an empty word.*variable"):
        parse_blend("--data-path", ["0.6", "a", "0.4", ""])


@pytest.mark.parametrize("name", ["link/a", "linked", "./a", "a.idx", "a.json"])
def test_a_data_set_that_is_named_twice_is_refused_whatever_its_names(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for end in ("bin", "idx", "json"):
        Path(f"a.{end}").touch()
        Path(f"linked.{end}").symlink_to(f"a.{end}")
    Path("link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"names a twice.*name it once"):
        split_blends(DataConfig(data_path=("a", name)))
