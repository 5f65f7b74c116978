"""The rows of docs/memory.md, from what a dry run prints."""

import subprocess
from types import SimpleNamespace

import pytest

from tools.benchmarks import memory_table

FITS = """changes of flags to fit 80.0 GiB, cheapest first; each needs less than those above it
over   100.0 GiB  as given
        79.4 GiB  --use-distributed-optimizer
fits 80.0 GiB: add --use-distributed-optimizer
"""
AS_GIVEN = "        40.0 GiB  as given\nfits 80.0 GiB: no change is needed\n"
NOTHING = "over    92.2 GiB  --grad-reduce-in-bf16\nnothing that was tried fits 80.0 GiB: take more ranks\n"


def _row(printed: str, monkeypatch: pytest.MonkeyPatch) -> str:
    done = SimpleNamespace(stdout=printed, stderr="error: some reason")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    return memory_table.row("8x7B", 8, 80.0)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = "--expert-model-parallel-size 8"
    assert _row(FITS, monkeypatch) == f"8x7B  on  8 GPUs        79.4 GiB  {layout} --use-distributed-optimizer"
    assert _row(AS_GIVEN, monkeypatch) == f"8x7B  on  8 GPUs        40.0 GiB  {layout}"
    assert _row(NOTHING, monkeypatch) == "8x7B  on  8 GPUs   over 92.2 GiB  nothing that was tried is enough"
    with pytest.raises(ValueError, match="8x7B on 8 GPUs: error: some reason"):
        _row("", monkeypatch)
