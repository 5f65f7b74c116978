"""Machines that hold copies of a data set of their own must hold the same one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from distributed_testing import run_distributed
from model_testing import tiny_arguments

from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from megatron.core.parallel_state import build_process_groups
from megatron.core.tokenizers.null_tokenizer import NullTokenizer
from megatron.training.config import Arguments
from megatron.training.progress import Progress
from megatron.training.setup import build_datasets
from pretrain_gpt import datasets_provider


def _write(prefix: Path, first_token: int) -> None:
    prefix.parent.mkdir(exist_ok=True)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(9):
            writer.add_document(range(first_token, first_token + 40))
        writer.finalize()


def _build(rank: int, world_size: int, arguments: Arguments, folder: Path, names: list[str]) -> list[str]:
    """What the rank is told of each data set; its machine has it in a folder of its own."""
    groups = build_process_groups(arguments.parallel, rank, world_size)
    answers = []
    for name in names:
        own = replace(arguments, data=replace(arguments.data, data_path=(str(folder / str(rank) / name),)))
        batches = own.training.batches(groups.dp.size)
        trainer = SimpleNamespace(arguments=own, groups=groups, batches=batches, batch_size=batches.last)
        try:
            build_datasets(trainer, Progress(), NullTokenizer(203), datasets_provider)  # type: ignore[arg-type]
            answers.append("")
        except ValueError as error:
            answers.append(str(error))
    return answers


def test_another_copy_is_refused_on_every_rank(tmp_path: Path) -> None:
    for rank in range(2):
        _write(tmp_path / str(rank) / "same", 1)
        _write(tmp_path / str(rank) / "other", 1 + rank)  # of the same lengths
    settings = {"mock_data": False, "split": "100", "eval_iters": 0, "data_path": ("nothing",)}
    outcomes = run_distributed(_build, 2, tiny_arguments(settings=settings), tmp_path, ["same", "other"])
    refusal = f"rank 1: {tmp_path}/1/other is not the same on all machines: copy the data set there again"
    assert [answers[0] for answers in outcomes] == ["", ""]
    assert all(answers[1].startswith(refusal) for answers in outcomes)
