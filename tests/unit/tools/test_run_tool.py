"""What all tools have in common: their command line, and how they end."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = {
    path: path.read_text()
    for path in sorted((ROOT / "tools").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
}
TOOLS = [path for path, text in SCRIPTS.items() if "ArgumentParser(" in text]
STARTED_BY_TOOLS = [path for path in SCRIPTS if path not in TOOLS and path.name != "launch.py"]


@pytest.mark.parametrize("path", STARTED_BY_TOOLS, ids=lambda path: path.name)
def test_what_tools_start_says_what_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    output, error = capsys.readouterr()
    assert (ended.value.code, error) == (0, "") and output.strip()


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_says_what_it_is(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(path), "--help"]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_every_tool_has_an_example_and_reads_its_command_line_quietly(path: Path) -> None:
    text = path.read_text()
    assert re.search(rf"python tools/\S*{path.name} ", text), "an example in --help"
    assert not re.search(r"\.parse_args\(", text), "run_tool.parsed, so that `--help | head` ends quietly"


@pytest.mark.parametrize("flags", [["--help"], ["--pp", "2", "--microbatches", "4"]], ids=["help", "run"])
def test_a_reader_that_has_left_ends_a_tool_without_a_word(flags: list[str]) -> None:
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        assert reader.stdin is not None
        command = [sys.executable, str(ROOT / "tools" / "show_schedule.py"), *flags]
        done = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
        reader.stdin = None
    assert (done.returncode, done.stderr) == (141, "")
