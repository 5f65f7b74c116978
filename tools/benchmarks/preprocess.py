#!/usr/bin/env python3
"""Speed of tools/preprocess_data.py, compared with bare tokenizers and other pipelines on the same text, in one run."""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from megatron.core.tokenizers import Tokenizer, build_tokenizer
from tools.benchmarks.machine import ROOT, machine
from tools.preprocessing.engine import EngineUnavailable, engine_source, make_engine
from tools.preprocessing.settings import TokenizerFlags, token_type
from tools.run_tool import parsed, run_tool, tool_parser

EXAMPLES = """examples:
  python tools/benchmarks/preprocess.py --tokenizer-model mixtral/tokenizer.model
  python tools/benchmarks/preprocess.py --input corpus.jsonl --tokenizer-type PretrainedTokenizerFromHF \\
      --tokenizer-model mixtral/ --workers 16
  python tools/benchmarks/preprocess.py --tokenizer-model tokenizer.model --megatron-lm ../Megatron-LM --only Megatron
MB are of UTF-8 text, without JSON. Rounds alternate between the contestants, so that a noisy machine disturbs all.
Processor time, of all processes together, is disturbed less: from it come the MB per core and second."""
DOCUMENT_CHARACTERS = (800, 2000, 4000, 8000, 100_000)
_BEGINNING = 100
_MEGATRON = "Megatron-LM's tool"
CHINESE = "我们训练一个混合专家模型。数据先被切分成词元，然后写入索引文件；每个文档都以结束符结尾。"


def write_corpus(path: Path, megabytes: float) -> None:
    """Real text that is on this machine: sources and documents of Python and its packages, and some Chinese."""
    folders = [sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]]
    size = number = 0
    with open(path, "w", encoding="utf-8") as file:
        for source in _sources(folders):
            while source and size < megabytes * 1e6:
                length = DOCUMENT_CHARACTERS[number % len(DOCUMENT_CHARACTERS)]
                text, source = source[:length], source[length:]
                if number % 20 == 19:
                    start = number % 40
                    text = (CHINESE[start:] + CHINESE[:start]) * (1 + number % 12)
                file.write(json.dumps({"text": text, "id": number}, ensure_ascii=number % 2 == 0) + "\n")
                size += len(text.encode())
                number += 1
            if size >= megabytes * 1e6:
                return


def _sources(folders: list[str]) -> Iterator[str]:
    """Texts in an order that mixes packages and does not change from run to run."""
    paths = {
        path
        for folder in folders
        for suffix in ("py", "md", "rst", "txt", "pyi", "html", "h", "cpp")
        for path in Path(folder).rglob(f"*.{suffix}")
    }
    for path in sorted(paths, key=lambda path: str(path)[::-1]):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 100 < len(text) < 200_000:
            yield text


class Seconds(NamedTuple):
    """Time of a measurement: by the clock, and of the processor in all processes."""

    wall: float
    processor: float


def measured(work: Callable[[], None]) -> Seconds:
    """Time of `work` and of the child processes that it starts and waits for."""

    def processor() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    wall, before = time.monotonic(), processor()
    work()
    return Seconds(time.monotonic() - wall, processor() - before)


def read_texts(path: str, part: int = 0, parts: int = 1) -> list[str]:
    """The texts of the lines that are `part` modulo `parts`."""
    with open(path, "rb") as file:
        return [json.loads(line)["text"] for number, line in enumerate(file) if number % parts == part]


def _encode_alone(name: str, flags: TokenizerFlags, path: str, part: int, parts: int, pipe: Any) -> None:
    """A core's part of a bare encoder: texts are in memory, ids are thrown away."""
    tokenizer = build_tokenizer(flags, flags.vocab_size)
    engine = make_engine(name, tokenizer, engine_source(name, tokenizer))
    texts = read_texts(path, part, parts)
    pipe.send("ready")
    pipe.recv()
    before = time.process_time()
    for start in range(0, len(texts), 64):
        engine.encode_batch(texts[start : start + 64])
    pipe.send(time.process_time() - before)


def bare_seconds(name: str, flags: TokenizerFlags, path: str, workers: int) -> Seconds:
    """`workers` processes that only encode, from when all have their texts to when the last has ended."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for part in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_encode_alone, args=(name, flags, path, part, workers, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    start = time.monotonic()
    for pipe in pipes:
        pipe.send("go")
    processor = sum(pipe.recv() for pipe in pipes)
    wall = time.monotonic() - start
    for process in processes:
        process.join()
    return Seconds(wall, processor)


def run_script(script: Path, flags: list[str], path: str, workers: int, output: Path) -> None:
    """A preprocessing tool as a user starts it, from the command to its end. Raises ValueError if it fails."""
    command = [
        sys.executable, str(script), "--input", path, "--output-prefix", str(output), "--append-eod", "--workers",
        str(workers), *flags,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"{script} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")


_tokenizer: Tokenizer


def _start_stand_in(flags: TokenizerFlags) -> None:
    global _tokenizer
    _tokenizer = build_tokenizer(flags, flags.vocab_size)


def _encode_line(line: str) -> tuple[list[int], int]:
    ids = _tokenizer.tokenize(json.loads(line)["text"])
    return [*ids, _tokenizer.eod], len(line)


def run_stand_in(flags: TokenizerFlags, path: str, workers: int, output: Path) -> None:
    """The well-known pipeline: pool.imap over lines in chunks of 32, a tokenizer call and a write a document."""
    tokenizer = build_tokenizer(flags, flags.vocab_size)
    pool = multiprocessing.get_context("spawn").Pool(workers, _start_stand_in, (flags,))
    with open(path, encoding="utf-8") as file, IndexedDatasetWriter(output, token_type(tokenizer)) as writer:
        for ids, _ in pool.imap(_encode_line, file, 32):
            writer.add_document(ids)
        writer.finalize()
    pool.close()
    pool.join()


class Contestant(NamedTuple):
    """What is measured: `seconds` of a file. A tool is a new process each time, a bare tokenizer is ready."""

    name: str
    seconds: Callable[[str], Seconds]
    is_tool: bool


def contestants(args: argparse.Namespace, folder: Path) -> list[Contestant]:
    """All that can run here, this project's tool first; those that cannot are listed at once."""
    flags = TokenizerFlags(tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model)
    words = ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", args.tokenizer_model]
    workers: int = args.workers

    def tool(name: str, run: Callable[[str], None]) -> Contestant:
        return Contestant(name, lambda path: measured(lambda: run(path)), True)

    def script(name: str, checkout: Path, output: str) -> Contestant:
        path_of_script = checkout / "tools" / "preprocess_data.py"
        return tool(name, lambda path: run_script(path_of_script, words, path, workers, folder / output))

    found = [script("preprocess_data.py", ROOT, "ours")]
    tokenizer = build_tokenizer(flags)
    for name in ("gigatoken", "sentencepiece", "hf"):
        try:
            make_engine(name, tokenizer, engine_source(name, tokenizer))
        except EngineUnavailable as error:
            print(f"absent: bare {name} ({error})")
        else:
            found.append(Contestant(f"bare {name}", partial(bare_seconds, name, flags, workers=workers), False))
    found.append(tool("stand-in pipeline", lambda path: run_stand_in(flags, path, workers, folder / "stand_in")))
    if args.megatron_lm:
        found.append(script(_MEGATRON, Path(args.megatron_lm), "megatron"))
    else:
        print("absent: Megatron-LM's tool (give a checkout with --megatron-lm)")
    return [
        each for each in found if not args.only or any(word in each.name for word in ("preprocess_data", *args.only))
    ]


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Print the table. Raises ValueError or OSError."""
    print(machine(("gigatoken", "tokenizers", "sentencepiece", "orjson", "numpy")))
    path = args.input
    if path is None:
        path = str(folder / "corpus.jsonl")
        write_corpus(Path(path), args.megabytes)
    beginning = folder / "beginning.jsonl"
    with open(path, "rb") as whole, open(beginning, "wb") as part:
        part.writelines(itertools.islice(whole, _BEGINNING))
    size, small = (sum(len(text.encode()) for text in read_texts(each)) / 1e6 for each in (path, str(beginning)))
    print(f"{size:.1f} MB of text, {args.workers} workers, {args.rounds} rounds")
    entries = contestants(args, folder)
    times: dict[str, list[Seconds]] = {each.name: [] for each in entries}
    starts: dict[str, list[Seconds]] = {each.name: [] for each in entries}
    for number in range(args.rounds):
        for each in entries:
            starts[each.name].append(each.seconds(str(beginning)) if each.is_tool else Seconds(0, 0))
            times[each.name].append(each.seconds(path))
            rate = size / times[each.name][-1].wall
            print(f"round {number + 1}: {each.name} {rate:.2f} MB/s", file=sys.stderr)
    print(f"{'':20} {'MB/s':>7} {'lowest':>7} {'highest':>8} {'ours is':>8} | {'once started':>12} {'ours is':>8} |"
          f" {'start, s':>8} | {'MB per core-s':>13} {'ours is':>8}")  # fmt: skip
    for each in entries:
        print(_row(each, size, small, times, starts))
    print(
        f"Once started: {size - small:.1f} MB in the time beyond that of a run over the first {_BEGINNING} documents, "
        "which is the start.\nThe stand-in is no Megatron-LM: it is the same shape of program with this project's "
        "reference tokenizer."
    )
    if _MEGATRON in times:
        outputs = [(folder / f"{name}_text_document.bin").read_bytes() for name in ("ours", "megatron")]
        print("Megatron-LM's tokens and ours are " + ("equal." if outputs[0] == outputs[1] else "NOT equal."))


def _row(
    each: Contestant, size: float, small: float, times: dict[str, list[Seconds]], starts: dict[str, list[Seconds]]
) -> str:
    """A row of the table: medians, and medians of the ratios in each round."""
    name, ours = each.name, next(iter(times))

    def rates(name: str) -> list[float]:
        return [size / whole.wall for whole in times[name]]

    def started(name: str) -> list[float]:
        pairs = zip(times[name], starts[name])
        return [(size - small * bool(start.wall)) / (whole.wall - start.wall) for whole, start in pairs]

    def per_core(name: str) -> list[float]:
        return [size / whole.processor for whole in times[name]]

    def ratio(values: Callable[[str], list[float]]) -> float:
        return statistics.median(a / b for a, b in zip(values(ours), values(name)))

    start = f"{statistics.median(start.wall for start in starts[name]):.2f}" if each.is_tool else ""
    return (
        f"{name:20} {statistics.median(rates(name)):7.2f} {min(rates(name)):7.2f} {max(rates(name)):8.2f} "
        f"{ratio(rates):7.2f}x | {statistics.median(started(name)):12.2f} {ratio(started):7.2f}x | {start:>8} | "
        f"{statistics.median(per_core(name)):13.2f} {ratio(per_core):7.2f}x"
    )


def main() -> int:
    """Run the benchmark; returns its exit code."""
    parser = tool_parser(__doc__, EXAMPLES, allow_abbrev=False)
    add = parser.add_argument
    add("--tokenizer-model", required=True, help="as for tools/preprocess_data.py")
    add("--tokenizer-type", default="Llama2Tokenizer", help="as for tools/preprocess_data.py (default: sentencepiece)")
    add("--input", metavar="FILE", help="a .jsonl file with the key text (default: text found on this machine)")
    add("--megabytes", type=float, default=60, help="size of the text if none is given (default: 60)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes of each contestant (default: all cores)")
    add("--rounds", type=int, default=5, help="measurements of each contestant (default: 5)")
    add("--megatron-lm", metavar="FOLDER", help="a checkout of Megatron-LM to measure too")
    add("--only", nargs="+", metavar="WORD", help="besides this project's tool, only contestants with one in the name")
    args = parsed(parser)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        return run_tool(lambda: measure(args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
