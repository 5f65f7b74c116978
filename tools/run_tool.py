"""What tools have in common: their command lines, how they end, and how many cores they have."""

import argparse
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence

from megatron.core.atomic_files import allow_open_files, error_sentence
from megatron.core.text_files import terminal_output


def run_tool(
    action: Callable[[], object],
    *,
    interrupted: str = "interrupted",
    sentence: Callable[[ValueError | OSError], str] = error_sentence,
) -> int:
    """Exit code of a tool: 0, or 1 after one sentence on stderr for whatever the user can get wrong."""
    allow_open_files()
    with terminal_output():
        try:
            action()
        except (ValueError, OSError) as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"error: {interrupted}", file=sys.stderr)
            return 130
        return 0


def tool_parser(description: str | None, epilog: str | None = None, *, allow_abbrev: bool = True) -> ArgumentParser:
    """A parser whose help has both texts with the lines as they are written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return ArgumentParser(description=description, epilog=epilog, formatter_class=formatter, allow_abbrev=allow_abbrev)


def parsed(parser: ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line (`sys.argv` if not given); a reader of --help that leaves (`| head`) ends the tool quietly."""
    with terminal_output():
        return parser.parse_args(argv)


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(text: str) -> int:
    """Type of an argument that counts something."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
