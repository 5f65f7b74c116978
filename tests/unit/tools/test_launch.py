"""tools/launch.py: it says once what became of the run."""

import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron.training.environment import Environment
from megatron.training.initialize import _leave_words
from megatron.training.signals import StopSignal
from tools import launch


@pytest.mark.parametrize(
    ("rank", "said", "words"),
    [(0, True, ""), (0, False, "stopped by SIGTERM\n"), (8, True, "stopped by SIGTERM\n"), (None, False, "")],
    ids=["printed by the rank", "not printed", "printed on another machine", "no rank has ended in order"],
)
def test_the_last_words_of_a_run_are_printed_once(
    rank: int | None, said: bool, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(arguments: list[str]) -> None:
        stop_signal = StopSignal()
        stop_signal._note(signal.SIGTERM)
        stop_signal.farewell = "stopped by SIGTERM"
        if rank is not None:
            file = os.environ["MEGATRON_FAREWELL_FILE"]
            _leave_words(Environment(rank, 16, rank % 8, 8, farewell_file=file), stop_signal, said=said)
        raise SignalException("", signal.SIGTERM)

    monkeypatch.setattr(launch, "main", job)
    monkeypatch.setattr(launch, "_wait_for_ranks", lambda patience: None)
    monkeypatch.setenv("MEGATRON_FAREWELL_FILE", "")  # which `launch` sets for good
    assert launch.launch([]) == (rank is None)
    output, errors = capsys.readouterr()
    assert output == words and (errors == "") == (rank is not None)
    assert not Path(os.environ["MEGATRON_FAREWELL_FILE"]).exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [(1, "rank 3 has said above why it ended (exit status 1)"), (-9, "rank 3 was ended by SIGKILL (exit status -9)")],
)
def test_a_failed_job_ends_without_a_traceback(
    status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(arguments: list[str]) -> None:
        raise ChildFailedError("train.py", {3: ProcessFailure(local_rank=3, pid=1, exitcode=status, error_file="")})

    monkeypatch.setattr(launch, "main", job)
    monkeypatch.setenv("MEGATRON_FAREWELL_FILE", "")
    assert launch.launch([]) == 1
    assert capsys.readouterr().err == f"the job has failed: {words}\n"
