"""How far the work is."""

import sys
import time

_SECONDS_BETWEEN_LINES = 30
_WIDTH = 24


class Progress:
    """A bar that renews itself on a terminal, else a line every `log_interval` documents or half a minute."""

    def __init__(self, total_bytes: int, done_bytes: int, log_interval: int, label: str) -> None:
        self._total, self._begun, self._interval, self._label = max(total_bytes, 1), done_bytes, log_interval, label
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._logged = 0
        self._bytes = done_bytes
        self._documents = self._bad = 0

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def update(self, done_bytes: int, documents: int, bad: int) -> None:
        """Where the work is now; shown when it is time."""
        self._bytes, self._documents, self._bad = done_bytes, documents, bad
        now = time.monotonic()
        if self._terminal and now - self._shown >= 0.2:
            filled = _WIDTH * self._bytes // self._total
            bar = "#" * filled + "." * (_WIDTH - filled)
            print(f"\r\033[K{self._label}[{bar}] {self._line()}", end="", file=sys.stderr, flush=True)
            self._shown = now
        elif not self._terminal and (
            documents - self._logged >= self._interval or now - self._shown >= _SECONDS_BETWEEN_LINES
        ):
            print(self._label + self._line(), file=sys.stderr, flush=True)
            self._shown, self._logged = now, documents

    def _line(self) -> str:
        rate = (self._bytes - self._begun) / self.seconds
        left = int((self._total - self._bytes) / rate) if rate > 0 else 0
        time_left = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        bad = f" | {self._bad} bad" if self._bad else ""
        return (
            f"{100 * self._bytes // self._total}% | {self._bytes / 1e6:.1f} of {self._total / 1e6:.1f} MB | "
            f"{rate / 1e6:.1f} MB/s | {time_left} | {self._documents} documents{bad}"
        )

    def finish(self) -> None:
        """Show the final state."""
        start = "\r\033[K" if self._terminal else ""
        print(start + self._label + self._line(), file=sys.stderr, flush=True)
