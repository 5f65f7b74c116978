"""Runs the Triton kernels in Triton's interpreter where there is no GPU."""

import importlib.util
import os

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

if not torch.cuda.is_available():
    # read when a kernel is decorated, that is, when its module is imported
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
