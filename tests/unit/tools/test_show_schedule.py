"""The drawings of schedules: those in the documentation are the tool's."""

import shlex
from pathlib import Path

import pytest

from tools import show_schedule

PIPELINE_PAGE = Path(__file__).resolve().parents[3] / "docs" / "pipeline.md"


def test_the_documentation_shows_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = PIPELINE_PAGE.read_text()
    commands = [part.partition("`")[0] for part in page.split("`python tools/show_schedule.py ")[1:]]
    assert len(commands) == 2
    for command in commands:
        assert show_schedule.main(shlex.split(command)) == 0
        assert f"```\n{capsys.readouterr().out}```" in page


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--pp 4 --microbatches 6 --virtual 2", "needs a multiple of"),
        ("--pp 0 --microbatches 6", "must be positive"),
        ("--pp 1 --microbatches 6 --virtual 2", "need --pp above 1"),
    ],
)
def test_shapes_that_do_not_exist(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_schedule.main(shlex.split(command)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
