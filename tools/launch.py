"""torchrun with a quiet end: after SIGTERM or Ctrl-C it says what the ranks did, instead of a traceback.

Takes torchrun's arguments. Exit status: torchrun's; after a signal 0 if the ranks have stopped in order, otherwise 1.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main


def launch(arguments: list[str]) -> int:
    """Runs torchrun; returns its status after a signal, and raises what else it raises."""
    with tempfile.TemporaryDirectory() as folder:
        farewell = Path(folder) / "farewell"
        os.environ["MEGATRON_FAREWELL_FILE"] = str(farewell)  # the first rank of this machine leaves its words here
        try:
            main(arguments)
        except SignalException as stopped:
            _wait_for_ranks(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)))
            words = farewell.read_text() if farewell.exists() else ""
            print(
                words or f"error: {stopped.sigval.name} ended the job before its ranks could stop in order",
                file=sys.stdout if words else sys.stderr,
            )
            return 0 if words else 1
    return 0


def _wait_for_ranks(patience: float) -> None:
    """Waits for ranks that torchrun, which a third signal ends at once, has left behind: they may be saving."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    deadline = time.monotonic() + patience
    try:
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
    except ChildProcessError:
        return


if __name__ == "__main__":
    status = launch(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the store's thread would abort a process that ends by itself
