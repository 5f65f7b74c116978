#!/usr/bin/env python3
"""How long opening a data set and building its training index take, in what memory, and how fast samples are read.

Each measurement is a process of its own. The data set is synthetic: real lengths, and tokens that are a hole in a file.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, SampleFormat
from megatron.core.datasets.indexed_dataset import MAGIC, VERSION, IndexedDataset

BLOCK = 1 << 22
SEQ_LENGTH = 4096
UINT16 = 8


def write_synthetic(prefix: Path, documents: int) -> None:
    """A data set of documents of 20 to 999 tokens, mean about 500, all token 0."""
    lengths = np.random.RandomState(1).randint(20, 1000, documents).astype("<i4")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(MAGIC + np.array([VERSION], "<u8").tobytes() + bytes([UINT16]))
        file.write(np.array([documents, documents + 1], "<u8").tobytes())
        file.write(lengths.data)
        begin = 0
        for start in range(0, documents, BLOCK):
            ends = np.cumsum(lengths[start : start + BLOCK], dtype=np.int64) + begin
            file.write(((ends - lengths[start : start + BLOCK]) * 2).astype("<i8").data)
            begin = int(ends[-1])
        for start in range(0, documents + 1, BLOCK):
            file.write(np.arange(start, min(start + BLOCK, documents + 1), dtype="<i8").data)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * begin)


def measure(what: str, prefix: Path, cache: Path, epochs: float) -> str:
    """One measurement in this process: its seconds, or samples a second, and the process's peak memory."""
    if what == "numpy":
        helpers.helpers_cpp = None
    start = time.perf_counter()
    indexed = IndexedDataset(prefix)
    fingerprint = indexed.fingerprint
    if what == "open":
        return _result(time.perf_counter() - start, fingerprint[:8])
    samples = int(epochs * indexed.token_count) // SEQ_LENGTH
    start = time.perf_counter()
    form = SampleFormat(eod_token=1, reset_attention_mask=what == "documents")
    folder = cache / "numpy" if what == "numpy" else cache
    dataset = GPTDataset(indexed, (0, indexed.document_count), samples, SEQ_LENGTH, 1, "train", folder, form)
    if what in ("build", "numpy", "reuse"):
        return _result(time.perf_counter() - start, f"{dataset.num_epochs} epochs")
    count, start = 20_000, time.perf_counter()
    for index in range(count):
        dataset[index % samples]
    return f"{count / (time.perf_counter() - start):,.0f} samples/s"


def _result(seconds: float, note: str) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with open("/proc/self/smaps_rollup") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    anonymous = int(fields["Anonymous"].split()[0]) / 2**20
    return f"{seconds:.1f} s, peak {peak:.2f} GiB with mapped files, {anonymous:.2f} GiB of its own left ({note})"


def main() -> int:
    """Makes the data set and measures in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10**6, help="documents of the data set (default: a million)")
    parser.add_argument("--epochs", type=float, default=1.0, help="how often the run reads them (default: 1)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, help="where the data set and its cache go (default: a temporary folder)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(measure(args.only, args.folder / "synthetic", args.folder / "cache", args.epochs))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_synthetic(Path(folder) / "synthetic", args.documents)
        for _ in range(args.repeat):
            shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
            for what in ("open", "build", "reuse", "numpy", "read", "documents"):
                command = [sys.executable, __file__, "--only", what, "--folder", folder, "--epochs", str(args.epochs)]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                print(f"{what:9}  {result.stdout.strip()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
