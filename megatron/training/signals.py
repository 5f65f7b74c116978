"""SIGTERM, SIGINT (Ctrl-C) and SIGHUP as a request to save and stop, also of a process that hangs outside Python."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# torchrun passes on what it gets itself, so that a signal to a whole job comes twice. Ctrl-C by an impatient user
# counts only if it comes later than that.
_COPY_SECONDS = 1.0
_IMPATIENT = 3
# How long a signal waits, in seconds: for the main thread, which may be in a library; before the ranks know of each
# other; and for the end of a step, if three times the longest one so far is not more.
_MAIN_PATIENCE, _JOIN_PATIENCE, _STEP_PATIENCE = 3.0, 20.0, 60.0

INTERRUPTED = "error: interrupted; nothing was saved since the last checkpoint"

_early: list[int] = []


def remember_signals(command_line: list[str]) -> None:
    """Keeps signals that come while libraries are imported for `StopSignal.install`, if the run is to handle them.

    Otherwise Ctrl-C ends the process at once, without the traceback of an import, and the others do as usual.
    """
    if "--exit-signal-handler" in command_line:
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: _early.append(number))
    else:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


class StoppedAtStart(SystemExit):
    """Raised in the main thread when a signal comes before the first step: there is nothing to save."""


class StopSignal:
    """Remembers that a signal asked to save and stop; the loop asks after each step, evaluation batch and save.

    However often SIGTERM comes, it asks for the same, and never ends a save. Ctrl-C three times, or SIGQUIT, ends the
    process at once. So does a step or batch that does not end in reasonable time after a signal: another rank may be
    gone, and the main thread wait for it in a library for ever.
    """

    def __init__(self) -> None:
        self.name = ""
        """Name of the first signal that came."""
        self.farewell = ""
        """What the run did before it stopped."""
        self.said = False
        """Whether the first rank has printed it."""
        self._came: float | None = None
        self._leave: Callable[[int, str], None] = lambda status, sentence: os._exit(status)
        self._saves = False
        self._joined = self._training = self._stopped = False
        self._interrupts, self._last_interrupt = 0, -_COPY_SECONDS
        self._began: float | None = None
        self._longest = 0.0

    @property
    def received(self) -> bool:
        """Whether to stop."""
        return self._came is not None

    def seconds(self) -> float | None:
        """Time since the first signal, None if none has come."""
        return None if self._came is None else time.monotonic() - self._came

    def install(self, leave: Callable[[int, str], None], *, saves: bool, launched: bool = False) -> None:
        """Handles the signals from now on; `leave` ends the process with a status and a sentence, from any thread.

        Unless the run `saves`, only Ctrl-C is handled, as KeyboardInterrupt. SIGHUP that the caller ignores (nohup)
        is handled in a `launched` process all the same, since torchrun passes it on and then waits for the end.
        """
        self._leave, self._saves = leave, saves
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if saves:
            for number in STOPS:
                if launched or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._handle)
        else:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for early in _early:
            self._take(early)
        _early.clear()
        threading.Thread(target=self._run, args=(reader,), name="signals", daemon=True).start()

    def uninstall(self) -> None:
        """Ignores the signals, when all is done: the end of the interpreter would give them back their own effect."""
        if self._saves:
            for number in STOPS:
                signal.signal(number, signal.SIG_IGN)

    def release(self) -> bool:
        """Lets the signals end the process at once, as they do by default; whether one has come already."""
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        return self.received or bool(_early)

    def join(self) -> None:
        """Says that the ranks know of each other: until the first step a signal ends all of them at once."""
        self._joined = True
        if self.received:
            self._stop_at_start()

    def begin(self) -> None:
        """Marks the start of a step or of a batch of an evaluation."""
        self._training = True
        self._began = time.monotonic()

    def end(self) -> None:
        """Marks its end."""
        assert self._began is not None
        self._longest = max(self._longest, time.monotonic() - self._began)
        self._began = None

    def at_start(self) -> str:
        """What to tell the user if a signal came before the first step."""
        return f"stopped by {self.name} before the first step: there was nothing to save; the same command starts again"

    def overdue(self, now: float) -> tuple[int, str] | None:
        """Status and reason to end with if a signal has waited too long, None otherwise; `now` is time.monotonic()."""
        if self._came is None:
            return None
        waited = now - self._came
        if not self._saves:
            return (130, INTERRUPTED) if waited > _MAIN_PATIENCE else None
        if not self._training:
            return (0, self.at_start()) if waited > (_MAIN_PATIENCE if self._joined else _JOIN_PATIENCE) else None
        began, patience = self._began, max(_STEP_PATIENCE, 3 * self._longest)
        if began is None or now - max(began, self._came) <= patience:
            return None
        return 1, (
            f"error: {self.name} came, and the step under way did not end within {patience:.0f} s: a rank hangs; "
            "nothing was saved since the last checkpoint"
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if self._joined and not self._training:
            self._stop_at_start()

    def _stop_at_start(self) -> None:
        """Raises StoppedAtStart once: copies of the signal must not interrupt what it leads to."""
        if not self._stopped:
            self._stopped = True
            raise StoppedAtStart(0)

    def _note(self, number: int) -> None:
        if self._came is None:
            self.name, self._came = signal.Signals(number).name, time.monotonic()

    def _take(self, number: int) -> None:
        self._note(number)
        now = time.monotonic()
        if number == signal.SIGINT and now - self._last_interrupt >= _COPY_SECONDS:
            self._last_interrupt = now
            self._interrupts += 1
            if self._interrupts == _IMPATIENT:
                self._leave(130, INTERRUPTED)

    def _run(self, reader: int) -> None:
        """Takes the signals from the system, which hands them over also while the main thread is in a library."""
        while True:
            if select.select([reader], [], [], 0.5 if self.received else None)[0]:
                for number in os.read(reader, 64):
                    if number == signal.SIGINT or (self._saves and number in STOPS):
                        self._take(number)
            reason = self.overdue(time.monotonic())
            if reason is not None:
                self._leave(*reason)


def ignore_stop_signals(_worker: int) -> None:
    """Makes a loader process ignore the signals, which torchrun sends to it too: the training process needs it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
