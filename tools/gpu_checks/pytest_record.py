"""A plugin of pytest (-p tools.gpu_checks.pytest_record --record FILE) that writes each result down at once.

A line of JSON a test, so that what ran before the time was over is known; one more at the end on Triton's kernels.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

_KERNELS = "megatron.core.fusions.kernels.triton."


class _Recorder:
    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def _write(self, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's result is that of its call, or of what failed or was skipped before and after it."""
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") if report.failed else reason
            self._write({"test": report.nodeid, "outcome": report.outcome, "message": message.splitlines()[:1]})
        if report.when == "teardown":
            errors = [error for name, value in report.user_properties if name == "errors" for error in value]
            if errors:
                self._write({"test": report.nodeid, "errors": errors})

    def pytest_sessionfinish(self) -> None:
        """Triton has its kernels as objects of one class where it compiles and of another where it interprets."""
        modules = [module for name, module in list(sys.modules.items()) if name.startswith(_KERNELS)]
        kernels = {id(value): type(value).__name__ for module in modules for value in vars(module).values()}
        classes = Counter(name for name in kernels.values() if name in ("JITFunction", "InterpretedFunction"))
        self._write({"kernels": classes})


def pytest_addoption(parser: Any) -> None:
    """The option."""
    parser.addoption("--record", metavar="FILE", help="file that gets a line of JSON a test")


def pytest_configure(config: Any) -> None:
    """Begins to record if asked to."""
    if config.getoption("--record"):
        config.pluginmanager.register(_Recorder(config.getoption("--record")))
