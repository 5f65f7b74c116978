"""What reaches a stage: microbatches put together from samples, and which stages read them."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_testing import tiny_arguments

from megatron.core.datasets.gpt_dataset import MockGPTDataset, SampleFormat, make_sample
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.training.loader import collate, load_batches, worker_killed
from megatron.training.setup import batches

DOCUMENTS = SampleFormat(eod_token=0, reset_position_ids=True, reset_attention_mask=True)


def test_documents_of_a_microbatch_are_bounded_sample_by_sample() -> None:
    texts = ([5, 0, 6, 7, 8], [1, 2, 3, 4, 5])
    batch = collate([make_sample(torch.tensor(text).numpy(), DOCUMENTS) for text in texts])
    assert batch["document_bounds"].tolist() == [0, 2, 4, 8] and batch["document_bounds"].dtype == torch.int32
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch["tokens"].tolist() == [[5, 0, 6, 7], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[0, 6, 7, 8], [2, 3, 4, 5]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("flag", ["reset_position_ids", "reset_attention_mask", None])
def test_a_middle_stage_reads_only_what_it_needs(flag: str | None, num_workers: int) -> None:
    arguments = tiny_arguments(settings={"num_workers": num_workers} | ({flag: True} if flag else {}))
    dataset = MockGPTDataset(203, 16, 8, 1, replace(DOCUMENTS, **{flag: True} if flag else {}))
    groups = ProcessGroups(pp=Group(rank=1, ranks=(0, 1, 2)))
    trainer = SimpleNamespace(arguments=arguments, groups=groups, device=torch.device("cpu"))
    batch = next(batches(trainer, dataset, 0))
    if flag is None:
        assert batch is None
    else:
        assert batch["position_ids"].tolist() == [[*range(16)]] * 2
        assert batch["document_bounds"].tolist()[-1] == 32


class _Spoiled(torch.utils.data.Dataset):
    """Raises for the third sample, or kills the process that reads it."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index == 2:
            if self._error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise self._error
        return {"tokens": np.array([index])}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "sentence"), [(ValueError("b has id 60000"), "^b has id 60000$"), (OSError(5, "I/O", "b"), "^b: I/O$")]
)
def test_what_is_wrong_with_a_sample_is_said_as_it_is(num_workers: int, error: Exception, sentence: str) -> None:
    loaded = load_batches(_Spoiled(error), [[0, 1], [2, 3]], num_workers, torch.device("cpu"))  # type: ignore[arg-type]
    assert next(loaded)["tokens"].tolist() == [[0], [1]]
    with pytest.raises(ValueError, match=sentence):
        next(loaded)


def test_a_lost_process_is_said_with_what_helps() -> None:
    loaded = load_batches(_Spoiled(None), [[0, 1], [2, 3]], 1, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError) as caught:
        list(loaded)
    sentence = worker_killed(caught.value)
    assert sentence is not None and "--num-workers 0" in sentence and "Caught" not in sentence
    assert worker_killed(RuntimeError("CUDA out of memory")) is None


def test_too_little_shared_memory_is_said_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in loader processes too, which are forked
    batches_of = [[0, 1], [4, 5]]
    spoiled = _Spoiled(None)
    with pytest.raises(ValueError, match=r"/dev/shm\) is too small .*No space left.*--shm-size.*--num-workers 0"):
        list(load_batches(spoiled, batches_of, 1, torch.device("cpu")))  # type: ignore[arg-type]
    assert len(list(load_batches(spoiled, batches_of, 0, torch.device("cpu")))) == 2  # type: ignore[arg-type]

    def none(loader: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", none)
    with pytest.raises(ValueError, match=r"No space left on device.*--num-workers 0"):
        list(load_batches(spoiled, batches_of, 1, torch.device("cpu")))  # type: ignore[arg-type]
