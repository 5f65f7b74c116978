"""SIGTERM as a request to save and stop."""

import signal
from types import FrameType


class StopSignal:
    """Remembers that SIGTERM came; the loop asks at the end of each step."""

    def __init__(self) -> None:
        self.received = False

    def install(self) -> None:
        """Handles SIGTERM from now on."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = True


def leave_stopping_to_the_parent(_worker: int) -> None:
    """Makes a loader process ignore SIGTERM, which torchrun sends to it too: the training process still needs it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
