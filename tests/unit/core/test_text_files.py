"""Text from files: control characters are escaped, marks of Windows editors skipped, damage is a sentence."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.atomic_files import error_sentence
from megatron.core.text_files import printable, read_json, read_object, read_text, terminal_output

ROOT = Path(__file__).resolve().parents[3]
TITLE, CLIPBOARD = "\x1b]0;owned\x07", "\x1b]52;c;cm0=\x07"


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable(TITLE) == "\\x1b]0;owned\\x07" and "\x1b" not in printable(CLIPBOARD)
    assert printable("a\rb\x9b2Jc\u202ed\ud800\x00\x7f") == "a\\rb\\x9b2Jc\\u202ed\\ud800\\x00\\x7f"
    assert printable("ä 中\n\t’🙂") == "ä 中\n\t’🙂"
    assert error_sentence(ValueError(f"no tensor {TITLE}")) == "no tensor \\x1b]0;owned\\x07"
    assert error_sentence(FileNotFoundError(2, "No such file", f"a{CLIPBOARD}")).startswith("a\\x1b]52;c;")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_all_output_is_escaped_but_for_progress(monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    screen = _Terminal()
    monkeypatch.setattr(sys, stream, screen)
    with terminal_output():
        print(f"--- {TITLE}", file=getattr(sys, stream))
        print(f"\r\x1b[K{TITLE} 50%", end="", file=getattr(sys, stream), flush=True)
    assert screen.getvalue() == "--- \\x1b]0;owned\\x07\n\r\x1b[K\\x1b]0;owned\\x07 50%"
    assert getattr(sys, stream) is screen


@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_reader_that_leaves_ends_a_tool_quietly(lines: int) -> None:
    """`| head -1`, for output below and above what a pipe holds; 141 is what a shell shows for other tools."""
    program = (
        "import sys; from tools.run_tool import run_tool; sys.stdin.readline();"
        f"sys.exit(run_tool(lambda: print(*range({lines}), sep='\\n')))"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as tool:
        assert tool.stdin is not None and tool.stdout is not None and tool.stderr is not None
        tool.stdout.close()
        tool.stdin.write(b"go\n")
        tool.stdin.close()
        assert tool.stderr.read() == b"" and tool.wait() == 141


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_printed_gets_into_no_file_where_the_caller_closed_a_stream(tmp_path: Path, closed: str) -> None:
    program = """
import os, sys
from tools.run_tool import run_tool
def action():
    with open(sys.argv[1], "w") as file:
        for stream in (sys.stdout, sys.stderr):
            print("lost", file=stream, flush=True)
            assert not stream.isatty() and sys.stdin.read() == ""
        os.write(1, b"lost")  # as a library does
        os.write(2, b"lost")
        file.write("kept")
sys.exit(run_tool(action))
"""
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-c", program, str(tmp_path / "file")]
    assert subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


def test_a_standard_stream_that_is_full_is_named() -> None:
    program = 'import sys; from tools.run_tool import run_tool; sys.exit(run_tool(lambda: print("a" * 10_000)))'
    with open("/dev/full", "w") as full:
        tool = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (tool.returncode, tool.stderr) == (1, "error: standard output: No space left on device\n")


def test_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "ä"}).encode())
    assert read_text(path).startswith("{") and read_object(path) == {"a": "ä"}
    for content, problem in (
        (b"{", "not JSON"), (b"\xff\xfe{", "not UTF-8"), (b"[" * 100_000, "too deeply"), (b"1" * 5000, "not JSON"),
        (b"", "not JSON"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.json is.*{problem}"):
            read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json holds a list"):
        read_object(path)
