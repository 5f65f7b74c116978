"""Part: the conformance suite, every kernel against its formula in float64, in each type."""

import json
import math
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_checks.session import PartEnded, Session

# The whole suite of a GPU in processes of about the same length, most of which is compiling; on a CPU a sample of what
# stands in for it, Triton's interpreter and the C++.
_SUITES: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        "bfloat16": ("-m", "gpu", "-k", "bfloat16-cuda"),
        "float16": ("-m", "gpu", "-k", "float16-cuda and not bfloat16"),
        "float32": ("-m", "gpu", "-k", "float32-cuda"),
        "edges": ("-m", "gpu", "-k", "not cuda"),
    },
    "cpu": {"sample": ("-k", "13x600 or 7x13 or router")},
}
_MOST_FAILURES = 25


@dataclass
class Results:
    """What the tests of one form and type had."""

    outcomes: Counter[str] = field(default_factory=Counter)
    worst: tuple[float, float, str] = (0.0, 1.0, "")
    """Error, its bound and the test whose error is the largest part of its bound."""


def check_kernels(session: Session) -> str:
    """Runs the suite in several processes at once. Raises PartEnded if a test failed or no kernel ran on the GPU."""
    session.needs("pytest")
    suites = _SUITES[session.device]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in suites]
        commands = [
            [*session.python("pytest"), "tests/conformance", "-q", "-p", "no:cacheprovider"]
            + ["-p", "tools.gpu_checks.pytest_record", "--record", str(file), *words]
            for file, words in zip(files, suites.values(), strict=True)
        ]
        done = session.run_together(commands)
        lines = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    found, failures, classes = read_record(lines)
    table = session.part.table(
        "Tests by form and type", "form", "passed", "failed", "skipped", "worst relative error", "its bound", "in"
    )
    for name in sorted(found):
        counts, (error, bound, test) = found[name].outcomes, found[name].worst
        numbers = (f"{error:.1e}", f"{bound:.1e}", test) if test else ("", "", "")
        table.add(name, counts["passed"], counts["failed"], counts["skipped"], *numbers)
    if failures:
        failed = session.part.table("Failures", "test", "message")
        for test, message in failures[:_MOST_FAILURES]:
            failed.add(test, message)
    total = sum((results.outcomes for results in found.values()), Counter[str]())
    kinds = ", ".join(f"{count} as {name}" for name, count in sorted(classes.items()))
    session.part.note(f"Triton's kernels: {kinds or 'none loaded'}.")
    if total["skipped"]:
        session.part.note("A test is skipped where no kernel of its form takes part in the operation.")
    sentence = ", ".join(f"{total[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if total["failed"]:
        raise PartEnded("failed", sentence)
    broken = [ran for ran in done if ran.status not in (0, None)]
    if broken:
        raise PartEnded("failed", f"{sentence}; pytest {broken[0].ending}: {broken[0].last_words}")
    if any(ran.status is None for ran in done):
        raise PartEnded("unfinished", f"{sentence} when the time was over")
    if session.device == "cuda":
        check_device_ran(found, classes)
    return sentence


def check_device_ran(found: dict[str, Results], classes: Counter[str]) -> None:
    """Raises PartEnded unless Triton's kernels were compiled, and tests of them passed, on the GPU."""
    if classes["InterpretedFunction"]:
        raise PartEnded("failed", "Triton's interpreter ran instead of the GPU: is TRITON_INTERPRET set somewhere?")
    if not classes["JITFunction"]:
        raise PartEnded("failed", "no kernel of Triton's was loaded")
    passed = {name for name, results in found.items() if results.outcomes["passed"]}
    empty = [name for name in ("bfloat16", "float16", "float32") if f"triton-{name}-cuda" not in passed]
    if empty:
        raise PartEnded("failed", f"no test of Triton's kernels passed on the GPU in {', '.join(empty)}")


def read_record(lines: list[dict[str, Any]]) -> tuple[dict[str, Results], list[tuple[str, str]], Counter[str]]:
    """Results by form and type, failed tests with a message, and Triton's kernels by class."""
    found: dict[str, Results] = {}
    failures: list[tuple[str, str]] = []
    classes: Counter[str] = Counter()
    for line in lines:
        if "kernels" in line:
            classes.update(line["kernels"])
            continue
        name, test = group_and_case(line["test"])
        results = found.setdefault(name, Results())
        for error, bound in line.get("errors", ()):
            error = math.inf if math.isnan(error) else error
            if error / bound >= results.worst[0] / results.worst[1]:
                results.worst = (error, bound, test)
        if "outcome" in line:
            results.outcomes[line["outcome"]] += 1
            if line["outcome"] == "failed":
                failures.append((test, " ".join(line["message"])))
    return found, failures, classes


def group_and_case(test: str) -> tuple[str, str]:
    """Form, type and device of a test of one form, such as triton-float16-cuda, and its case; others are edges."""
    function, _, parameters = test.rpartition("/")[2].removesuffix("]").partition("[")
    if not function.endswith("::test_equals_the_formula_in_float64"):
        return "edges", test.rpartition("/")[2]
    words = parameters.split("-")
    count = 3 if "cuda" in words[:3] else 2
    return "-".join(words[:count]), "-".join(words[count:])
