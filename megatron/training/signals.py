"""SIGTERM and Ctrl-C as a request to save and stop."""

import signal
from types import FrameType


class StopSignal:
    """Remembers that SIGTERM or SIGINT came; the loop asks at the end of each step."""

    def __init__(self) -> None:
        self.received = False

    def install(self) -> None:
        """Handles the two signals from now on; a second one ends the process as usual."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


def leave_stopping_to_the_parent(_worker: int) -> None:
    """Makes a loader process ignore both, which torchrun sends to it too: the training process still needs it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
