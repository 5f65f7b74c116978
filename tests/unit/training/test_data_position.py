"""A run that is stopped and resumed, also at another data-parallel size, reads every sample once, in the same order."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_testing import tiny_arguments

from megatron.core.config import DataConfig
from megatron.core.datasets.blended_dataset import build_train_valid_test_datasets
from megatron.core.datasets.gpt_dataset import Dataset
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tokenizers.null_tokenizer import NullTokenizer
from megatron.training.setup import batches

SEQ_LENGTH, MICRO_BATCH, GLOBAL_BATCH, STEPS = 4, 2, 8, 15
SAMPLES = STEPS * GLOBAL_BATCH
TOKENS = 211  # an epoch is 52.75 samples: its edge lies within a batch, a microbatch and a sample


@pytest.fixture
def data_path(tmp_path: Path) -> tuple[str, ...]:
    """Two data sets whose tokens are all different, so that a token tells its place."""
    random = np.random.default_rng(0)
    for name, first in (("a", 0), ("b", 1000)):
        cuts = np.sort(random.choice(np.arange(1, TOKENS), 20, replace=False))
        with IndexedDatasetWriter(tmp_path / name, "uint16") as writer:
            for document in np.split(np.arange(first, first + TOKENS), cuts):
                writer.add_document(document)
            writer.finalize()
    return (str(tmp_path / "a"), str(tmp_path / "b"))


def build(data_path: tuple[str, ...], samples: int) -> Dataset:
    config = DataConfig(seq_length=SEQ_LENGTH, data_path=data_path, split="100")
    dataset, _, _ = build_train_valid_test_datasets(config, (samples, 0, 0), 5, NullTokenizer(2000))
    assert dataset is not None
    return dataset


def read(dataset: Dataset, consumed: int, steps: int, dp_size: int, num_workers: int = 0) -> list[tuple[int, ...]]:
    """The samples that all ranks of a data-parallel size read in some steps, put in order."""
    arguments = tiny_arguments(settings={"micro_batch_size": MICRO_BATCH, "num_workers": num_workers})
    rounds = steps * GLOBAL_BATCH // (MICRO_BATCH * dp_size)
    by_round: list[list[tuple[int, ...]]] = [[] for _ in range(rounds)]
    for rank in range(dp_size):
        groups = ProcessGroups(dp=Group(rank=rank, ranks=tuple(range(dp_size))))
        trainer = SimpleNamespace(arguments=arguments, groups=groups, device=torch.device("cpu"))
        source = batches(trainer, dataset, consumed)
        for samples in by_round:
            batch = next(source)
            rows = torch.cat([batch["tokens"], batch["labels"][:, -1:]], dim=1)
            samples += map(tuple, rows.tolist())
    return [sample for samples in by_round for sample in samples]


@pytest.mark.parametrize("sources", [1, 2])
def test_every_sample_is_read_once_in_the_same_order(data_path: tuple[str, ...], sources: int) -> None:
    paths = data_path[:sources] if sources == 1 else ("0.7", data_path[0], "0.3", data_path[1])
    whole = build(paths, SAMPLES)
    undisturbed = [(*whole[i]["tokens"].tolist(), int(whole[i]["labels"][-1])) for i in range(SAMPLES)]
    for dp_size in (1, 2, 4):
        assert read(whole, 0, STEPS, dp_size) == undisturbed
    # steps at which the run stops: in the middle of an epoch and around the edges (step 6.6, step 13.2)
    for stops in ([3], [6], [7], [3, 6, 7, 13], list(range(1, STEPS))):
        bounds, found = [0, *stops, STEPS], []
        for part, (begin, end) in enumerate(zip(bounds, bounds[1:])):  # noqa: RUF007
            # a restart may also ask for a longer run than the one before
            dataset = build(paths, SAMPLES if part % 2 else end * GLOBAL_BATCH)
            found += read(dataset, begin * GLOBAL_BATCH, end - begin, (1, 4, 2)[part % 3])
        assert found == undisturbed, stops


def test_an_epoch_is_read_completely_before_the_next(data_path: tuple[str, ...]) -> None:
    found = read(build(data_path[:1], SAMPLES), 0, STEPS, 2)
    numbers = [token for sample in found for token in sample[:-1]]
    for epoch in range(2):
        inside = numbers[epoch * 52 * SEQ_LENGTH : (epoch + 1) * 52 * SEQ_LENGTH]
        assert len(inside) - len(set(inside)) <= 2 * SEQ_LENGTH  # the sample that lies across an edge
    counts = np.bincount(numbers, minlength=TOKENS)
    assert counts.min() >= 2 and counts.max() <= 3


def test_loader_processes_give_the_same_order(data_path: tuple[str, ...]) -> None:
    dataset = build(data_path, SAMPLES)
    assert read(dataset, 16, 5, 2, num_workers=2) == read(dataset, 16, 5, 2)
