"""torchrun with a quiet end: a sentence about what the ranks did, instead of a traceback.

Takes torchrun's arguments. Exit status: torchrun's; after a signal 0 if the ranks have stopped in order, otherwise 1.
"""

import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from megatron.core.text_files import open_standard_streams


def launch(arguments: list[str]) -> int:
    """Runs torchrun; returns its status, and raises what else it raises."""
    with tempfile.TemporaryDirectory() as folder:
        farewell = Path(folder) / "farewell"
        # the first rank of this machine makes it when all is well; what it has not printed itself is in it
        os.environ["MEGATRON_FAREWELL_FILE"] = str(farewell)
        try:
            main(arguments)
        except SignalException as stopped:
            _wait_for_ranks(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)))
            if not farewell.exists():
                print(
                    f"error: {stopped.sigval.name} ended the job before its ranks could stop in order", file=sys.stderr
                )
                return 1
            if words := farewell.read_text():
                print(words)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else "has said above why it ended"
            print(f"the job has failed: rank {rank} {how} (exit status {failure.exitcode})", file=sys.stderr)
            return 1
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
    open_standard_streams()
    status = launch(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)  # the store's thread would abort a process that ends by itself
