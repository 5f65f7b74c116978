"""The report of what runs where names every operation, and gives a reason for what does not run."""

import pytest
import torch

from megatron.core.fusions.forms import TABLE
from megatron.core.fusions.kernels import load
from tools.show_forms import main


def test_every_operation_is_listed_and_triton_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    lines = out[out.index("on cpu") :].split("on cuda,")[0].splitlines()
    assert [line.split()[0] for line in lines if line.endswith("the formula")] == list(TABLE)
    swiglu = next(number for number, line in enumerate(lines) if line.startswith("  swiglu "))
    assert ("C++" in lines[swiglu]) == (not isinstance(load("cpu.wrapper"), str))
    assert "not Triton: " in "".join(lines[swiglu : swiglu + 3])
    assert ("on cuda" in out.splitlines()) == torch.cuda.is_available()


def test_an_unknown_operation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--operation", "swiglu", "sandwich"]) == 1
    assert "--operation sandwich: there is no such operation" in capsys.readouterr().err
