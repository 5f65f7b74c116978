"""The GPU check without a GPU: parts end in time and leave no process, what they read is judged, reports are whole."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_testing import run_distributed

from tools import gpu_check
from tools.gpu_checks import conformance, example, speed, training
from tools.gpu_checks.collectives import operations
from tools.gpu_checks.commands import ROOT, TORCHRUN, Ran, run_together
from tools.gpu_checks.report import JSON, MARKDOWN, Part, Report
from tools.gpu_checks.session import Machine, PartEnded, Session, must_end_well

MACHINE = Machine("3.12.1", "2.11.0", None, None, "Linux", [], {"triton": None, "pytest": None}, "", False)
# Starts a process in a new session, as torchrun starts its ranks, and names it.
STARTS_ANOTHER = (
    "import subprocess, sys; waits = [sys.executable, '-c', 'import signal; signal.pause()']; "
    "print(subprocess.Popen(waits, start_new_session=True).pid, flush=True)"
)


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _part(name: str = "kernels") -> Part:
    return Part(name, name.title(), "Something.")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("keeps_running", [False, True])
def test_no_process_outlives_its_command(keeps_running: bool) -> None:
    script = STARTS_ANOTHER + ("; import signal; signal.pause()" if keeps_running else "")
    # what was started has said so before the limit, unless the machine stands still
    (ran,) = run_together([[sys.executable, "-c", script]], 2.0 if keeps_running else 60.0)
    assert (ran.status is None) == keeps_running
    assert not _is_alive(int(ran.output))


def test_commands_run_without_an_outer_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "TRITON_INTERPRET", "KEPT"):
        monkeypatch.setenv(name, "1")
    words = [
        sys.executable,
        "-c",
        "import os; print(*(name for name in ('RANK', 'TRITON_INTERPRET', 'KEPT') if name in os.environ))",
    ]
    first, second = run_together([words, [sys.executable, "-c", "import sys; print('error: no'); sys.exit(3)"]], 60)
    assert first.output.split() == ["KEPT"] and first.ending == "ended with status 0"
    with pytest.raises(PartEnded, match=r"ended with status 3: error: no"):
        must_end_well(second)
    assert Ran(("a",), -signal.SIGSEGV, "", 1.0).ending == "ended by SIGSEGV"
    assert Ran((*TORCHRUN, "--nproc-per-node", "2", "-m", "a.b"), 0, "", 1.0).name == "`a.b --nproc-per-node 2`"
    assert Ran((sys.executable, "-m", "a.b", f"{ROOT}/c.py", "--d"), 0, "", 1.0).name == "`c.py`"


def test_a_part_without_time_stops() -> None:
    session = Session("cpu", MACHINE, _part(), 0.0)
    with pytest.raises(PartEnded) as ended:
        session.run([sys.executable, "-c", ""])
    assert ended.value.status == "unfinished"


def _fakes(monkeypatch: pytest.MonkeyPatch, **runs: object) -> None:
    monkeypatch.setattr(gpu_check, "probe", lambda seconds: MACHINE)
    checks = {name: gpu_check.Check(run, 1, name, f"{name}.") for name, run in runs.items()}  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_check, "CHECKS", checks)


def test_a_failed_part_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "out", []

    def right(session: Session) -> str:
        session.part.table("Some numbers", "a", "b").add(1, "x | y\x1b]0;z")
        return "one number"

    def wrong(session: Session) -> str:
        seen.append(json.loads((folder / JSON).read_text()))  # the report of the first part is there already
        raise ZeroDivisionError("by nothing")

    def slow(session: Session) -> str:
        raise PartEnded("unfinished", "too long")

    def without(session: Session) -> str:
        session.needs("pytest")
        return ""

    _fakes(monkeypatch, right=right, wrong=wrong, slow=slow, without=without)
    assert gpu_check.main(["--device", "cpu", "--output", str(folder)]) == 1
    assert [part["status"] for part in seen[0]["parts"]] == ["passed", "waiting", "waiting", "waiting"]
    values = json.loads((folder / JSON).read_text())
    advice = " (give it more than 8 minutes with --minutes)"
    slow_part = "not finished in its share: slow"
    assert values["verdict"] == f"FAILED: 1 of 4 parts passed; failed: wrong; {slow_part}; skipped: without{advice}"
    text = (folder / MARKDOWN).read_text()
    assert f"**{values['verdict']}**" in text.splitlines()[2]
    assert "**failed**: ZeroDivisionError: by nothing" in text and "pytest is not installed" in text
    assert "| 1 | x \\| y\\x1b]0;z |" in text and "\x1b" not in text
    assert sorted(path.name for path in folder.iterdir()) == [JSON, MARKDOWN]
    assert gpu_check.main(["--device", "cpu", "--output", str(folder), "--parts", "right", "without"]) == 0
    assert gpu_check.main(["--device", "cpu", "--output", str(folder), "--parts", "right", "slow"]) == 3
    text = (folder / MARKDOWN).read_text()
    assert f"**NOT FINISHED: 1 of 2 parts passed; {slow_part}{advice}**" in text
    assert "| slow | not finished in its share | 0 of " in text


def test_a_check_that_is_ended_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(session: Session) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "not reached"

    before = signal.getsignal(signal.SIGTERM)
    _fakes(monkeypatch, right=lambda session: "fine", ended=ended, never=ended)
    try:
        assert gpu_check.main(["--device", "cpu", "--output", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    values = json.loads((tmp_path / JSON).read_text())
    assert values["verdict"].startswith("NOT FINISHED: 1 of 3 parts passed; interrupted: ended; not run yet: never")
    assert values["parts"][0]["sentence"] == "fine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 1
    assert "error: torch" in (err := capfd.readouterr().err) and "--device cpu" in err
    assert not list(tmp_path.iterdir())


def test_the_report_stays_under_a_megabyte() -> None:
    parts = []
    for name in gpu_check.CHECKS:
        part = _part(name)
        for _ in range(12):
            part.ran(Ran(("python", "x" * 10_000), 1, "error\n" * 10_000, 1.0))
        part.listing("something", "y" * 50_000)
        part.status = "failed"
        parts.append(part)
    report = Report("cuda", "a GPU", parts)
    assert len(report.markdown().encode()) + len(json.dumps(report.parts, default=vars).encode()) < 2**20


TEST = "tests/conformance/test_operations.py::test_equals_the_formula_in_float64"
COMPILED, FORMS_OF_GPU = (
    Counter(JITFunction=9),
    [f"triton-{dtype}-cuda" for dtype in ("bfloat16", "float16", "float32")],
)


def test_results_are_counted_by_form_and_the_worst_error_is_named() -> None:
    lines = [
        {"test": f"{TEST}[triton-float16-cuda-swiglu 0x8]", "outcome": "passed", "message": []},
        {"test": f"{TEST}[triton-float16-cuda-swiglu 0x8]", "errors": [[1e-4, 1e-3], [2e-4, 1e-2]]},
        {"test": f"{TEST}[triton-float16-cuda-norm - a]", "outcome": "failed", "message": ["wrong"]},
        {"test": f"{TEST}[triton-float16-cuda-norm - a]", "errors": [[math.nan, 1e-3]]},
        {"test": f"{TEST}[amx-float32-norm 1x2]", "outcome": "skipped", "message": ["no kernel"]},
        {"test": "tests/conformance/test_edges.py::test_ties[triton]", "outcome": "passed", "message": []},
        {"kernels": {"JITFunction": 9}},
    ]
    found, failures, classes = conformance.read_record(lines)
    assert found["triton-float16-cuda"].outcomes == {"passed": 1, "failed": 1}
    assert found["triton-float16-cuda"].worst == (math.inf, 1e-3, "norm - a")
    assert found["amx-float32"].outcomes == {"skipped": 1} and found["edges"].outcomes == {"passed": 1}
    assert failures == [("norm - a", "wrong")] and classes == COMPILED


def test_kernels_must_have_run_on_the_gpu() -> None:
    passed, skipped = conformance.Results(Counter(passed=1)), conformance.Results(Counter(skipped=1))
    found = dict.fromkeys(FORMS_OF_GPU, passed)
    conformance.check_device_ran(found, COMPILED)
    for wrong, classes, message in (
        (found, Counter(InterpretedFunction=1), "interpreter"),
        (found, Counter(), "no kernel of Triton's was loaded"),
        ({**found, FORMS_OF_GPU[0]: skipped}, COMPILED, "in bfloat16"),
        (dict.fromkeys(FORMS_OF_GPU[:2], passed), COMPILED, "in float32"),
    ):
        with pytest.raises(PartEnded, match=message):
            conformance.check_device_ran(wrong, classes)


def test_each_test_is_written_down(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_right(record_property): record_property('errors', [(1e-8, 1e-7)])\n"
        "def test_wrong(): assert 1 == 2\ndef test_left_out(): pytest.skip('not here')\n"
    )
    record = ["-p", "tools.gpu_checks.pytest_record", "--record", str(tmp_path / "record")]
    words = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), *record, str(tmp_path)]
    run_together([words], 60)
    lines = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert [line["outcome"] for line in lines if "outcome" in line] == ["passed", "failed", "skipped"]
    assert [line["errors"] for line in lines if "errors" in line] == [[[1e-8, 1e-7]]]
    assert "assert 1 == 2" in lines[2]["message"][0] and lines[-1] == {"kernels": {}}


def test_on_a_machine_with_a_gpu_tests_of_triton_are_marked(tmp_path: Path) -> None:
    """Otherwise `pytest -m gpu` leaves them out, and a run without it compiles for the GPU."""
    pytest.importorskip("triton")
    (tmp_path / "pretended.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\n"
        "def pytest_collection_finish(session):\n"
        "    for item in session.items: print(item.nodeid, '=', 'gpu' in item.keywords)\n"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    words = [sys.executable, "-m", "pytest", "-p", "pretended", "-p", "no:cacheprovider", "--collect-only", "-qq"]
    (done,) = run_together([[*words, "-m", "", "tests/conformance"]], 60, path)
    lines = done.output.splitlines()
    marked, others = ([line for line in lines if line.endswith(f" = {mark}")] for mark in (True, False))
    for name in ("test_of_equal_experts_the_first_is_taken[triton]", "test_every_kernel_meets_a_case[triton]"):
        assert any(name in line for line in marked)
    assert any("triton-bfloat16-cuda" in line for line in marked)
    assert len(others) > 100 and not [line for line in others if "triton" in line]


def _check_collectives(rank: int, size: int) -> list[tuple[str, bool, bool]]:
    found = []
    for operation in operations(rank, size, 1000, torch.device("cpu")):
        before = operation.is_right()
        operation.run()
        found.append((operation.name, before, operation.is_right()))
    return found


def test_collectives_are_right_and_were_not_before() -> None:
    for found in run_distributed(_check_collectives, 2):
        assert len(found) == 6 and all(after for _, _, after in found)
        assert [name for name, before, _ in found if before] == ["all_to_all without rows"]


def test_differences_beyond_the_bounds_and_nan_are_seen() -> None:
    reference = [training.Step(8.0, 2.0), training.Step(7.0, 2.0)]
    bounds = training.BOUNDS["float32"]
    assert training.within(bounds, *training.differences(reference, reference))
    for wrong in (training.Step(7.0002, 2.0), training.Step(7.0, 2.001), training.Step(math.nan, 2.0)):
        losses, norms = training.differences([reference[0], wrong], reference)
        assert not training.within(bounds, losses, norms)


def test_as_many_layers_as_fit() -> None:
    assert [example.most_layers(18.0, 31.0, available, 32) for available in (18.0, 30.9, 31.0, 130.0, 999.0)] == [
        1,
        1,
        2,
        9,
        32,
    ]


def test_the_example_scripts_settings_are_understood() -> None:
    session = Session("cuda", MACHINE, _part(), 60.0)
    settings = example.script_settings(session)
    assert (settings["HIDDEN_SIZE"], settings["NUM_EXPERTS"], settings["SEQ_LENGTH"]) == ("4096", "4", "4096")
    flags = example.model_flags(session, settings, 3)
    assert flags[:4] == ["--num-layers", 3, "--hidden-size", "4096"]


LAYER = """
8 experts, top 2, 4096 tokens
                                  forward TFLOP/s        forward+backward   time / best of ours  kept GB  peak GB
this project, grouped_mm  601.0 (590.0 to 610.0)  540.0 (530.0 to 545.0)   1.00 (1.00 to 1.00)    0.100    1.000
this project, loop        500.0 (490.0 to 510.0)  555.0 (550.0 to 556.0)   1.20 (1.20 to 1.20)    0.100    1.000
torch grouped_mm          700.0 (690.0 to 710.0)  600.0 (600.0 to 600.0)   0.90 (0.90 to 0.90)    0.200    2.000

4 experts, top 2, 8192 tokens
this project, loop        100.0 (490.0 to 510.0)   50.0 (550.0 to 556.0)   1.20 (1.20 to 1.20)    0.100    1.000

single operations, 8192 tokens, 4 experts
  combine                            900.0 (880.0 to 910.0) GB/s
  weight gradient, tiles       450000.0 (440000.0 to 451000.0) GFLOP/s
  weight gradient, persistent  640000.0 (630000.0 to 650000.0) GFLOP/s
"""
STEP = """
                                    seconds a step  GFLOP/s           time / ours          floor / time
this project                0.041 (0.041 to 0.041) 481250.5   1.00 (1.00 to 1.00)   2.07 (2.07 to 2.07)
transformers, eager         0.143 (0.143 to 0.143)    700.5   3.46 (3.46 to 3.46)   0.60 (0.60 to 0.60)
"""


def test_rates_of_this_project_are_read() -> None:
    assert [rate.value for rate in speed.read_layer_rates(LAYER)] == [601.0, 555.0, 100.0, 50.0]
    shape = "8192 tokens, 4 experts"
    assert speed.read_gradient_rates(LAYER) == [(shape, "tiles", 450e3), (shape, "persistent", 640e3)]
    assert [rate.value for rate in speed.read_step_rate(STEP)] == [481.2505]
    assert speed.read_step_rate("warming up\n") == []


def test_peak_memory_is_reported_after_a_script(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
    (tmp_path / "script.py").write_text("import sys, neighbour\nprint(neighbour.NAME, sys.argv[1:], __name__)\n")
    words = [sys.executable, "-m", "tools.gpu_checks.with_peak", str(tmp_path / "script.py"), "--flag"]
    (ran,) = run_together([words], 60)
    first, last = ran.output.strip().splitlines()
    assert first == "neighbour ['--flag'] __main__"
    assert json.loads(last)["peak"]["resident"] > 2**20


def test_environment_without_triton_fails_on_a_gpu() -> None:
    from tools.gpu_checks.environment import _check_triton

    part = _part()
    with pytest.raises(PartEnded, match="Triton is not installed"):
        _check_triton(Session("cuda", MACHINE, part, 1.0))


GPU = {"name": "NVIDIA H200", "capability": "9.0", "total": 140 * 2**30, "free": 139 * 2**30}
ON_GPUS = replace(MACHINE, gpus=[GPU, GPU], packages={"triton": "3.6.0", "transformers": None})


class Scripted(Session):
    """Answers commands with what a function of their words says, instead of running them."""

    def __init__(self, answer: Callable[[list[str]], tuple[int | None, str]]) -> None:
        super().__init__("cuda", ON_GPUS, _part(), 1000.0)
        self._answer = answer

    def run_together(
        self,
        commands: Sequence[Sequence[str]],
        environment: Mapping[str, str] | None = None,
        at_most: float = math.inf,
    ) -> list[Ran]:
        return [Ran(tuple(words), *self._answer(list(words)), 1.0) for words in commands]


def _write_steps(words: list[str], losses: Sequence[float]) -> None:
    lines = [{"lm_loss": loss, "grad_norm": 1.0, "tokens_per_second": 20_000.0} for loss in losses]
    Path(words[words.index("--metrics-path") + 1]).write_text("\n".join(map(json.dumps, lines)))


def test_a_layer_less_is_taken_when_memory_runs_out() -> None:
    tried = []

    def answer(words: list[str]) -> tuple[int | None, str]:
        if "bash" in words:
            return 0, run_together([words], 60)[0].output
        layers = int(words[words.index("--num-layers") + 1])
        if "--dry-run" in words:
            return 0, f"weights 1 GiB\ntotal    {5 + 13 * layers}.00 GiB   {5 + 12 * layers}.00 GiB\n"
        tried.append(layers)
        if layers > 8:
            return 1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
        _write_steps(words, [8.0] * 5)
        log = "".join(f"throughput per GPU (TFLOP/s/GPU): {rate} |\n" for rate in (9.0, 99.0, 480.0, 481.0, 482.0))
        return 0, log + json.dumps({"peak": {"allocated": 120 * 2**30, "reserved": 125 * 2**30}})

    session = Scripted(answer)
    sentence = example.check_example(session)
    # 139 GiB less 4 % less 3 are 130.4; 5 + 13 * 9 are 122
    assert tried == [9, 8]
    assert sentence == "8 layer(s): 20,000 tokens/s, 481.0 TFLOP/s (goal 480), peak 120.0 GiB = 110 % of the dry run's"
    rows = dict(session.part.tables[0].rows)
    assert rows["goal on an H200"] == "480 TFLOP/s, reached"
    assert rows["peak reserved"] == "125.00 GiB, 115 % of the dry run's"


def test_a_layout_that_hangs_or_differs_does_not_hide_the_others() -> None:
    def answer(words: list[str]) -> tuple[int | None, str]:
        if "tools.gpu_checks.collectives" in words:
            return 0, "W1129 some warning\ncollective\tall_reduce\t256\t1.5\t170.0\n"
        if "--pipeline-model-parallel-size" in words:
            return None, "iteration 1"
        _write_steps(words, [8.0, 7.0, 6.1 if "--context-parallel-size" in words else 6.0])
        return 0, ""

    session = Scripted(answer)
    with pytest.raises(PartEnded, match=r"not equal to one process: PP=2; CP=2$") as ended:
        training.check_layouts(session)
    assert ended.value.status == "failed"
    assert session.part.tables[0].rows == [("all_reduce", "256", "1.5", "170.0")]
    results = {row[0]: row[4] for row in session.part.tables[-1].rows}
    assert results["TP=2, sequence parallel"] == results["EP=2"] == "equal" and results["CP=2"] == "differs"
    assert results["PP=2"] == "stopped after 1 s, the time it had: iteration 1"
    assert "TP=2, PP=2, EP=2, DP=2" in session.part.notes[0]


def test_goals_are_stated_with_what_was_reached() -> None:
    session = Scripted(lambda words: (0, LAYER if "moe_layer.py" in words[1] else STEP))
    assert speed.check_speed(session) == (
        "3 of 5 rates reach the goals for an H200: forward 601 of 600, forward and backward 555 of 550, "
        "training step 481 of 480"
    )
    assert [row[-1] for row in session.part.tables[0].rows] == ["reached"] * 2 + ["not reached"] * 2 + ["reached"]
    assert session.part.notes == ["transformers is not installed: it is left out of the comparisons."]


@pytest.mark.slow
def test_the_whole_check_on_a_cpu(tmp_path: Path) -> None:
    words = [sys.executable, "tools/gpu_check.py", "--device", "cpu", "--minutes", "15", "--output", str(tmp_path)]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    values = json.loads((tmp_path / JSON).read_text())
    assert values["verdict"] == f"PASSED: {len(gpu_check.CHECKS)} of {len(gpu_check.CHECKS)} parts passed"
    assert (tmp_path / MARKDOWN).stat().st_size + (tmp_path / JSON).stat().st_size < 2**20
