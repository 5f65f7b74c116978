"""Runs a script with its arguments, then prints the most memory it had: `with_peak.py SCRIPT ARGUMENTS`.

The last line is JSON: allocated and reserved bytes of the CUDA device, or resident bytes of a process on a CPU.
"""

import json
import resource
import runpy
import sys
from pathlib import Path

import torch


def peak() -> dict[str, int]:
    """Bytes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"resident": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    print(json.dumps({"peak": peak()}), flush=True)
