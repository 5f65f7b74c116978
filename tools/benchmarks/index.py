#!/usr/bin/env python3
"""How long opening a data set and building its training index take, in what memory, and how fast samples are read.

Each measurement is a separate process; its memory is what it holds apart from mapped files. For building, the data set
has lengths and offsets, but its tokens are a hole in a file; for reading, a small one has random tokens.

Example:
  python tools/benchmarks/index.py --documents 1000000 --repeat 3
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, SampleFormat
from megatron.core.datasets.indexed_dataset import MAGIC, VERSION, IndexedDataset
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from tools.run_tool import parsed, tool_parser

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


def write_random(prefix: Path) -> None:
    """A data set of 20,000 documents of 20 to 999 random tokens, small enough to stay in memory."""
    random = np.random.RandomState(1)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(20_000):
            writer.add_document(random.randint(0, 32_000, random.randint(20, 1000)))
        writer.finalize()


def measure(what: str, folder: Path, epochs: float) -> str:
    """One measurement in this process: seconds and the process's own peak memory, or samples a second."""
    if what in ("read", "documents"):
        return _read(folder, what == "documents")
    if what == "numpy":
        helpers.helpers_cpp = None
    memory = _PeakMemory()
    start = time.perf_counter()
    indexed = IndexedDataset(folder / "synthetic", random_access=True)
    assert indexed.fingerprint
    if what != "open":
        start = time.perf_counter()
        samples = int(epochs * indexed.token_count) // SEQ_LENGTH
        cache = folder / ("cache_numpy" if what == "numpy" else "cache")
        GPTDataset(indexed, (0, indexed.document_count), samples, SEQ_LENGTH, 1, "train", cache)
    return f"{time.perf_counter() - start:.1f} s, {memory.peak() / 2**30:.2f} GiB"


def _read(folder: Path, documents: bool) -> str:
    indexed = IndexedDataset(folder / "random", random_access=True)
    form = SampleFormat(eod_token=0, reset_attention_mask=documents, reset_position_ids=documents)
    count = 4 * indexed.token_count // SEQ_LENGTH
    dataset = GPTDataset(indexed, (0, indexed.document_count), count, SEQ_LENGTH, 1, "train", None, form, 32_000)
    start = time.perf_counter()
    for index in range(count):
        dataset[index]
    return f"{count / (time.perf_counter() - start):,.0f} samples/s"


class _PeakMemory:
    """Watches the memory of this process that is not the mapping of a file."""

    def __init__(self) -> None:
        self._peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            self._peak = max(self._peak, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")))

    def peak(self) -> int:
        """Bytes."""
        self._done.set()
        self._thread.join()
        return self._peak


def main() -> int:
    """Makes the data set and measures in turn."""
    parser = tool_parser(__doc__)
    parser.add_argument("--documents", type=int, default=10**6, help="documents of the data set (default: a million)")
    parser.add_argument("--epochs", type=float, default=1.0, help="how often the run reads them (default: 1)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, help="where the data set and its cache go (default: a temporary folder)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parsed(parser)
    if args.only:
        print(measure(args.only, args.folder, args.epochs))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_synthetic(Path(folder) / "synthetic", args.documents)
        write_random(Path(folder) / "random")
        for _ in range(args.repeat):
            for cache in ("cache", "cache_numpy"):
                shutil.rmtree(Path(folder) / cache, ignore_errors=True)
            for what in ("open", "build", "reuse", "numpy", "read", "documents"):
                command = [sys.executable, __file__, "--only", what, "--folder", folder, "--epochs", str(args.epochs)]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                print(f"{what:9}  {result.stdout.strip()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
