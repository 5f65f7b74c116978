"""Every form of an operation that this machine has; what is not there leaves no test behind."""

from collections.abc import Callable, Iterator

import pytest
import torch
from conformance_testing import errors


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _record_errors(record_property: Callable[[str, object], None]) -> Iterator[None]:
    errors.clear()
    yield
    if errors:
        record_property("errors", list(errors))
