"""Every form of an operation that this machine has; what is not there leaves no test behind."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
