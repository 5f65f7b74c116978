#!/usr/bin/env python3
"""Tokenise jsonl files into Megatron's indexed data sets, `<output-prefix>_<key>_document.bin` and `.idx`."""

import argparse
import glob
import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.core.atomic_files import error_sentence
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter, optimal_dtype
from megatron.core.tokenizers import TOKENIZER_TYPES, Tokenizer, build_tokenizer

CHUNK_BYTES = 1 << 20
CHUNKS_IN_FLIGHT_PER_WORKER = 3
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXAMPLE = """example:
  python tools/preprocess_data.py --input corpus/ --output-prefix encoded/corpus --json-keys text \\
      --tokenizer-type PretrainedTokenizerFromHF --tokenizer-model mixtral/ --append-eod --workers 8
writes encoded/corpus_text_document.bin and .idx; the same bytes for any number of workers."""


class Chunk(NamedTuple):
    """The lines of a file that begin in [start, end)."""

    path: str
    start: int
    end: int


class Encoded(NamedTuple):
    """One key's documents of a chunk: token bytes back to back, tokens of each document, how many had no token."""

    tokens: bytes
    lengths: list[int]
    empty: int


class LineError(ValueError):
    """A line that cannot be used; `position` is the byte of the file where it begins."""

    def __init__(self, path: str, position: int, reason: str) -> None:
        super().__init__(path, position, reason)
        self.path, self.position, self.reason = path, position, reason

    def sentence(self) -> str:
        """File, line number and reason; reads the file up to the line to count."""
        line, left = 1, self.position
        with open(self.path, "rb") as file:
            while block := file.read(min(left, CHUNK_BYTES)):
                line += block.count(b"\n")
                left -= len(block)
        return f"{self.path}, line {line}: {self.reason}"


class Encoder:
    """Turns chunks of a corpus into token ids, in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._tokenizer: Tokenizer = build_tokenizer(args, args.vocab_size)
        self._dtype = optimal_dtype(self._tokenizer.vocab_size)
        self._keys: list[str] = args.json_keys
        self._append_eod: bool = args.append_eod

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer's vocabulary."""
        return self._tokenizer.vocab_size

    def encode(self, chunk: Chunk) -> list[Encoded]:
        """The documents of a chunk for each key. Raises LineError for the first line that cannot be used."""
        tokens = [bytearray() for _ in self._keys]
        lengths: list[list[int]] = [[] for _ in self._keys]
        empty = [0] * len(self._keys)
        for position, line in _lines(chunk):
            try:
                texts = _texts(line, self._keys)
                for i, text in enumerate(texts):
                    ids = self._tokenizer.tokenize(text)
                    if not ids:
                        empty[i] += 1
                        continue
                    if self._append_eod:
                        ids.append(self._tokenizer.eod)
                    tokens[i] += np.array(ids, dtype=self._dtype).tobytes()
                    lengths[i].append(len(ids))
            except ValueError as error:
                raise LineError(chunk.path, position, str(error)) from None
        return [Encoded(bytes(part), count, none) for part, count, none in zip(tokens, lengths, empty)]


def _lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Position and content of each line that is not blank."""
    with open(chunk.path, "rb") as file:
        position = chunk.start
        if position:
            position -= 1
            file.seek(position)
            # In pieces, because the rest of a line that began in an earlier chunk may be longer than many chunks.
            while position < chunk.end and (piece := file.readline(CHUNK_BYTES)):
                position += len(piece)
                if piece.endswith(b"\n"):
                    break
        while position < chunk.end and (line := file.readline()):
            text = line.removeprefix(BYTE_ORDER_MARK) if position == 0 else line
            if text.strip():
                yield position, text
            position += len(line)


def _texts(line: bytes, keys: list[str]) -> list[str]:
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1} of the line)") from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"not JSON ({reason})") from None
    if not isinstance(document, dict):
        raise ValueError(f"a JSON object is expected on each line, this is {_kind(document)}")
    texts = []
    for key in keys:
        if key not in document:
            raise ValueError(f"no key {key!r}; its keys are {', '.join(map(repr, list(document)[:10])) or 'none'}")
        text = document[key]
        if not isinstance(text, str):
            raise ValueError(f"the value of {key!r} is {_kind(text)}, not a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the value of {key!r} has half of a surrogate pair (bad \\u escape)") from None
        texts.append(text)
    return texts


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


_encoder: Encoder | None = None


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(args: argparse.Namespace) -> None:
    global _encoder
    # The parent answers Ctrl-C for all; a worker whose parent was killed must not wait for work for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(args)


def _encode_in_worker(chunk: Chunk) -> list[Encoded]:
    assert _encoder is not None
    return _encoder.encode(chunk)


def natural_order(path: Path) -> list[tuple[int, int | str]]:
    """Sort key under which 2.jsonl comes before 10.jsonl."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def find_inputs(pattern: str) -> list[Path]:
    """The files of a folder (*.jsonl and *.json, below it too), a single file, or a glob, in natural order."""
    path = Path(pattern)
    if path.is_dir():
        files = [file for suffix in ("jsonl", "json") for file in path.rglob(f"*.{suffix}") if file.is_file()]
        if not files:
            raise ValueError(f"--input {pattern} has no *.jsonl or *.json files in it")
    elif path.is_file():
        files = [path]
    else:
        files = [Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
        if not files:
            raise ValueError(f"--input {pattern} is no file, no folder, and no pattern that matches a file")
    return sorted(files, key=natural_order)


def chunks_of(files: list[Path]) -> Iterator[Chunk]:
    """Cut files into pieces of CHUNK_BYTES; independent of the number of workers."""
    for path in files:
        size = path.stat().st_size
        for start in range(0, size, CHUNK_BYTES):
            yield Chunk(str(path), start, min(start + CHUNK_BYTES, size))


def encoded_chunks(
    args: argparse.Namespace, files: list[Path], encoder: Encoder
) -> Iterator[tuple[int, list[Encoded]]]:
    """(bytes of input, its documents) of every chunk in order, from `args.workers` processes."""
    if args.workers == 1:
        for chunk in chunks_of(files):
            yield chunk.end - chunk.start, encoder.encode(chunk)
        return
    # Not forked: the tokenizer's library may already have threads here, which a forked child would miss.
    pool = ProcessPoolExecutor(args.workers, get_context("spawn"), _start_worker, (args,))
    pending: deque[tuple[int, Future[list[Encoded]]]] = deque()
    try:
        for chunk in chunks_of(files):
            pending.append((chunk.end - chunk.start, pool.submit(_encode_in_worker, chunk)))
            if len(pending) >= args.workers * CHUNKS_IN_FLIGHT_PER_WORKER:
                size, future = pending.popleft()
                yield size, future.result()
        while pending:
            size, future = pending.popleft()
            yield size, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process ended unexpectedly (killed, or out of memory?): try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Progress:
    """How far the work is: a line that renews itself on a terminal, else a line at times."""

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self._total, self._interval = total_bytes, log_interval
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._logged = 0
        self.bytes = self.documents = 0

    def advance(self, size: int, documents: int) -> None:
        """Count `size` more bytes and `documents` more documents, and show it when it is time."""
        self.bytes += size
        self.documents += documents
        now = time.monotonic()
        if self._terminal and now - self._shown >= 0.2:
            filled = 30 * self.bytes // self._total
            print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {self._line(now)} ", end="", file=sys.stderr, flush=True)
            self._shown = now
        elif not self._terminal and (self.documents - self._logged >= self._interval or now - self._shown >= 30):
            print(self._line(now), file=sys.stderr, flush=True)
            self._shown, self._logged = now, self.documents

    def _line(self, now: float) -> str:
        return (
            f"{100 * self.bytes // self._total}% | {self.bytes / 1e6:.1f} of {self._total / 1e6:.1f} MB | "
            f"{self.bytes / 1e6 / max(now - self._start, 1e-9):.2f} MB/s | {self.documents} documents"
        )

    def finish(self) -> None:
        """Show the final state."""
        print(("\r" if self._terminal else "") + self._line(time.monotonic()) + " " * 32, file=sys.stderr, flush=True)


def preprocess(args: argparse.Namespace) -> None:
    """Write the data set of each key. Raises ValueError or OSError with a sentence for the user."""
    files = find_inputs(args.input)
    encoder = Encoder(args)
    dtype = optimal_dtype(encoder.vocab_size)
    progress = Progress(max(sum(file.stat().st_size for file in files), 1), args.log_interval)
    empty = [0] * len(args.json_keys)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedDatasetWriter(f"{args.output_prefix}_{key}_document", dtype))
            for key in args.json_keys
        ]
        for size, parts in encoded_chunks(args, files, encoder):
            for i, (writer, part) in enumerate(zip(writers, parts)):
                writer.add_documents(np.frombuffer(part.tokens, dtype), part.lengths)
                empty[i] += part.empty
            progress.advance(size, len(parts[0].lengths))
        progress.finish()
        for key, writer in zip(args.json_keys, writers):
            if writer.document_count == 0:
                raise ValueError(f"--input {args.input} has no document with text under the key {key!r}")
        for writer in writers:
            writer.finalize()
    for writer, skipped in zip(writers, empty):
        note = f" ({skipped} empty documents left out)" if skipped else ""
        print(
            f"{writer.prefix}.bin and .idx: {writer.document_count} documents, {writer.token_count} tokens of type "
            f"{dtype.name} from {len(files)} file{'s' * (len(files) > 1)}{note}"
        )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with Megatron's flag names."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="folder of *.jsonl and *.json files, one file, or a glob")
    add("--output-prefix", required=True, metavar="PREFIX", help="where to write: PREFIX_KEY_document.bin and .idx")
    add("--json-keys", "--json_keys", nargs="+", default=["text"], metavar="KEY",
        help="keys of each line's object to take texts from; each becomes a data set (default: text)")  # fmt: skip
    add("--dataset-impl", choices=["mmap"], default="mmap", help="format of the output; mmap is the only one")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=True, help="kind of tokenizer")
    add("--tokenizer-model", metavar="PATH",
        help="folder of a Hugging Face tokenizer (or a file in it), or a sentencepiece tokenizer.model")  # fmt: skip
    add("--vocab-file", metavar="FILE", help="vocab.json of a GPT-2 tokenizer")
    add("--merge-file", metavar="FILE", help="merges.txt of a GPT-2 tokenizer")
    add("--vocab-size", type=int, metavar="N", help="entries of the vocabulary, for NullTokenizer")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenise (default: 1)")
    add("--log-interval", type=int, default=10000, metavar="N", help="documents between lines of progress in a log")
    add("--trust-remote-code", action="store_true", help="allow a Hugging Face tokenizer to run code of its own")
    args = parser.parse_args(argv)
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.output_prefix.endswith(os.sep) or Path(args.output_prefix).is_dir():
        parser.error(f"--output-prefix {args.output_prefix} is a folder: add the beginning of the files' names")
    if len(set(args.json_keys)) < len(args.json_keys):
        parser.error(f"--json-keys names a key twice: {' '.join(args.json_keys)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(argv)
    # One thread a process: the workers already use the cores that --workers grants.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        preprocess(args)
    except LineError as error:
        print(f"error: {error.sentence()}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        prefix = f"cannot write {args.output_prefix}: " if isinstance(error, OSError) and not error.filename else ""
        print(f"error: {prefix}{error_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
