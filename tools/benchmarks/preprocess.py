#!/usr/bin/env python3
"""How fast tools/preprocess_data.py is, beside bare tokenizers and other pipelines on the same text, in one run."""

import argparse
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
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from megatron.core.tokenizers import Tokenizer, build_tokenizer
from tools.benchmarks.machine import ROOT, machine
from tools.preprocessing.engine import EngineUnavailable, engine_source, make_engine
from tools.preprocessing.settings import TokenizerFlags, token_type

EXAMPLES = """examples:
  python tools/benchmarks/preprocess.py --tokenizer-model mixtral/tokenizer.model
  python tools/benchmarks/preprocess.py --input corpus.jsonl --tokenizer-type PretrainedTokenizerFromHF \\
      --tokenizer-model mixtral/ --workers 16
MB are of UTF-8 text, without JSON. Rounds alternate between the contestants, so that a noisy machine disturbs all.
Processor time, of all processes together, is disturbed less: from it come the MB per core and second."""
DOCUMENT_CHARACTERS = (800, 2000, 4000, 8000, 100_000)
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


def run_tool(script: Path, flags: list[str], path: str, workers: int, output: Path) -> None:
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


def contestants(args: argparse.Namespace, path: str, folder: Path) -> dict[str, Callable[[], Seconds]]:
    """Name of each contestant and what measures its seconds; those that cannot run here are listed at once."""
    flags = TokenizerFlags(tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model)
    words = ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", args.tokenizer_model]
    workers: int = args.workers
    ours = ROOT / "tools" / "preprocess_data.py"
    found: dict[str, Callable[[], Seconds]] = {
        "preprocess_data.py, whole run": lambda: measured(
            lambda: run_tool(ours, words, path, workers, folder / "ours")
        ),
    }
    tokenizer = build_tokenizer(flags)
    for name in ("gigatoken", "sentencepiece", "hf"):
        try:
            make_engine(name, tokenizer, engine_source(name, tokenizer))
        except EngineUnavailable as error:
            print(f"absent: bare {name} ({error})")
        else:
            found[f"bare {name}"] = lambda name=name: bare_seconds(name, flags, path, workers)  # type: ignore[misc]
    found["stand-in pipeline, whole run"] = lambda: measured(
        lambda: run_stand_in(flags, path, workers, folder / "stand_in")
    )
    if args.megatron_lm:
        found["Megatron-LM's tool, whole run"] = lambda: measured(
            lambda: run_tool(
                Path(args.megatron_lm) / "tools" / "preprocess_data.py", words, path, workers, folder / "megatron"
            )
        )
    else:
        print("absent: Megatron-LM's tool (give a checkout with --megatron-lm)")
    return found


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Print the table. Raises ValueError or OSError."""
    print(machine(("gigatoken", "tokenizers", "sentencepiece", "orjson", "numpy")))
    path = args.input
    if path is None:
        path = str(folder / "corpus.jsonl")
        write_corpus(Path(path), args.megabytes)
    texts = read_texts(path)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {size:.1f} MB of text, {args.workers} workers, {args.rounds} rounds")
    del texts
    entries = contestants(args, path, folder)
    times: dict[str, list[Seconds]] = {name: [] for name in entries}
    for number in range(args.rounds):
        for name, seconds in entries.items():
            times[name].append(seconds())
            print(f"round {number + 1}: {name} {size / times[name][-1].wall:.2f} MB/s", file=sys.stderr)
    ours = next(iter(times.values()))
    print(f"{'':30} {'MB/s':>7} {'lowest':>7} {'highest':>8} {'ours is':>8} | {'MB per core-s':>13} {'ours is':>8}")
    for name, values in times.items():
        rates = [size / each.wall for each in values]
        core_rate = statistics.median(size / each.processor for each in values)
        ratios = [statistics.median(b[i] / a[i] for a, b in zip(ours, values)) for i in (0, 1)]
        print(
            f"{name:30} {statistics.median(rates):7.2f} {min(rates):7.2f} {max(rates):8.2f} {ratios[0]:7.2f}x | "
            f"{core_rate:13.2f} {ratios[1]:7.2f}x"
        )
    print("The stand-in is no Megatron-LM: it is the same shape of program with this project's reference tokenizer.")


def main() -> int:
    """Run the benchmark; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tokenizer-model", required=True, help="as for tools/preprocess_data.py")
    add("--tokenizer-type", default="Llama2Tokenizer", help="as for tools/preprocess_data.py (default: sentencepiece)")
    add("--input", metavar="FILE", help="a .jsonl file with the key text (default: text found on this machine)")
    add("--megabytes", type=float, default=60, help="size of the text if none is given (default: 60)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes of each contestant (default: all cores)")
    add("--rounds", type=int, default=5, help="measurements of each contestant (default: 5)")
    add("--megatron-lm", metavar="FOLDER", help="a checkout of Megatron-LM to measure too")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(args, Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
