"""What tools have in common: how they end, and a type of argument."""

import argparse
import sys
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
        return _run(action, interrupted, sentence)


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line (`sys.argv` if not given); a reader of --help that leaves (`| head`) ends the tool quietly."""
    with terminal_output():
        return parser.parse_args(argv)


def _run(action: Callable[[], object], interrupted: str, sentence: Callable[[ValueError | OSError], str]) -> int:
    try:
        action()
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"error: {interrupted}", file=sys.stderr)
        return 130
    return 0


def positive(text: str) -> int:
    """Type of an argument that counts something."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
