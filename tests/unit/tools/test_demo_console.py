"""How the demo runs its commands and shows where it is."""

import io
import shlex
import sys
from pathlib import Path

import pytest

from tools.demo.console import Progress, StageFailed, run_command, shell_line


def quiet() -> Progress:
    return Progress({"only": 1.0}, io.StringIO())


def test_a_command_is_printed_so_that_a_shell_reads_it_back() -> None:
    command = ["python", "a b.py", "--flag", "x" * 100, "--other", "'quoted'", "two", "words"]
    text = shell_line(command, {"NAME": "one two", "EMPTY": ""})
    assert shlex.split(text.replace("\\\n", "")) == ["NAME=one two", "EMPTY=", *command]
    assert all(len(line) < 125 for line in text.splitlines())


def test_output_goes_to_the_log_and_variables_to_the_command(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['NAME'], os.getcwd()); print('late', file=sys.stderr)"
    log = tmp_path / "logs" / "a.log"
    run_command([sys.executable, "-c", code], log=log, folder=tmp_path, progress=quiet(), variables={"NAME": "value"})
    assert sorted(log.read_text().splitlines()) == sorted([f"value {tmp_path.resolve()}", "late"])


def test_variables_of_a_surrounding_torchrun_are_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    log = tmp_path / "a.log"
    code = "import os; print(os.environ.get('WORLD_SIZE'))"
    run_command([sys.executable, "-c", code], log=log, folder=tmp_path, progress=quiet())
    assert log.read_text() == "None\n"


def test_a_failure_shows_the_command_the_first_error_and_the_end_of_the_log(tmp_path: Path) -> None:
    code = "print('error: the reason'); [print(i) for i in range(100)]; raise SystemExit(3)"
    with pytest.raises(StageFailed) as failure:
        run_command([sys.executable, "-c", code], log=tmp_path / "a.log", folder=tmp_path, progress=quiet())
    message = str(failure.value)
    assert "status 3" in message and shlex.quote(code) in message
    assert "  | error: the reason\n" in message and message.endswith("  | 99")
    assert "  | 50\n" not in message


def test_a_missing_program_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        run_command(["no-such-program"], log=tmp_path / "a.log", folder=tmp_path, progress=quiet())


def test_a_command_is_ended_when_its_watch_fails(tmp_path: Path) -> None:
    marker = tmp_path / "ended"
    code = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(marker)!r}).touch(), sys.exit(0)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    log = tmp_path / "a.log"

    def watch() -> tuple[float, str]:
        if log.read_text():
            raise KeyboardInterrupt
        return 0.0, ""

    with pytest.raises(KeyboardInterrupt):
        run_command([sys.executable, "-c", code], log=log, folder=tmp_path, progress=quiet(), watch=watch)
    assert marker.exists()


def test_the_bar_counts_stages_by_their_share() -> None:
    progress = Progress({"short": 1.0, "long": 3.0}, io.StringIO())
    assert progress.overall() == 0
    progress.start("short", "first")
    progress.update(0.5, "")
    assert progress.overall() == pytest.approx(0.125)
    progress.start("long", "second")
    assert progress.overall() == pytest.approx(0.25)
    progress.update(2.0, "")
    assert progress.overall() == pytest.approx(1.0)


def test_a_log_gets_a_line_now_and_then_and_no_control_characters() -> None:
    stream = io.StringIO()
    progress = Progress({"only": 1.0}, stream)
    progress.start("only", "first")
    for step in range(1000):
        progress.update(step / 1000, f"step {step}")
    progress.close()
    assert "[1/1] first" in stream.getvalue()
    assert stream.getvalue().count("step") == 9
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
