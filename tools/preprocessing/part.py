"""One process's run over its part of the corpus: data sets, quarantine and journal under one prefix."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron.core.atomic_files import append, sync_file
from megatron.core.datasets.description import read_description
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter, WriterState
from megatron.core.tokenizers import Tokenizer
from tools.preprocessing.inputs import Corpus, Input
from tools.preprocessing.journal import Journal, journal_path, read_journal
from tools.preprocessing.pool import WorkerDied, WorkerPool
from tools.preprocessing.progress import Progress
from tools.preprocessing.reader import TOO_LONG, Block, blocks_of
from tools.preprocessing.settings import Settings, token_type
from tools.preprocessing.statistics import FileCount, Statistics
from tools.preprocessing.worker import Bad, Result

ENDS_WITHIN_A_LINE = "it ends in the middle of a line"
SECONDS_BETWEEN_JOURNALS = 10.0


class EngineDiffers(Exception):
    """The engine and the reference disagree about a document on the way; the message says where and how."""


class TooManyBad(ValueError):
    """More is bad than --max-bad-fraction and --allow-damaged-files allow."""


class Part(NamedTuple):
    """What one process works on."""

    settings: Settings
    prefix: str
    inputs: list[Input]
    corpus: Corpus
    """All that the job reads."""
    tokenizer: Tokenizer
    pool: WorkerPool
    label: str
    alive: Callable[[], None]
    """Called often; raises if another rank has failed."""

    @property
    def fingerprint(self) -> str:
        """See `Settings.fingerprint`."""
        return self.settings.fingerprint(self.inputs, self.tokenizer)

    def data_set(self, key: str) -> str:
        """Prefix of a key's data set."""
        return f"{self.prefix}_{key}_document"


class Report(NamedTuple):
    """What a finished part tells."""

    statistics: Statistics
    last_file: str
    last_file_lines: int
    kept_bytes: int
    """Of the bytes read, those that an earlier run had read."""


def quarantine_path(prefix: str) -> Path:
    """Where bad lines are listed."""
    return Path(f"{prefix}_quarantine.jsonl")


class PartRun:
    """Writes a part; on a kill, or an error that a second try can mend, what is done stays for --resume."""

    def __init__(
        self,
        part: Part,
        check: Callable[[Statistics, list[int]], None],
        check_on_the_way: Callable[[Statistics, str], None],
    ) -> None:
        """`check` is given the counts of the whole part, the other those so far and the file; either may raise."""
        self._part, self._check, self._check_on_the_way = part, check, check_on_the_way
        self._journal_path = journal_path(part.prefix)
        self._quarantine_temporary = Path(f"{quarantine_path(part.prefix)}.tmp")
        self._journal = self._start()
        self._kept_bytes = self._journal.statistics.read_bytes
        self._writers: list[IndexedDatasetWriter] = []
        self._quarantine: BinaryIO

    def _start(self) -> Journal:
        part = self._part
        found = read_journal(part.prefix) if part.settings.resume else None
        if found is None:
            if part.settings.resume:
                print(f"{part.label}there is no interrupted run to resume: starting from the beginning")
            keys = len(part.settings.json_keys)
            files = {file.path: FileCount([0] * keys, file.size) for file in part.inputs}
            return Journal(part.fingerprint, [WriterState()] * keys, Statistics([0] * keys, files))
        if found.fingerprint != part.fingerprint:
            raise ValueError(
                f"--resume: the interrupted run of {part.prefix} had other inputs, keys or another tokenizer, or files "
                "have changed since; give the same, or start from scratch without --resume"
            )
        documents = found.writers[0].documents
        print(f"{part.label}resuming after {documents} documents, {found.statistics.read_bytes / 1e6:.1f} MB")
        return found

    def run(self) -> Report:
        """Do the work. Raises EngineDiffers, TooManyBad, WorkerDied, ValueError or OSError."""
        part = self._part
        journaled = self._journal.statistics.lines > 0
        if not journaled:
            self._journal_path.unlink(missing_ok=True)
        with ExitStack() as stack:
            self._open(stack)
            try:
                self._write_blocks()
                if len(self._writers) == len(part.settings.json_keys):
                    self._save()
                    self._check(self._journal.statistics, [state.documents for state in self._journal.writers])
                self._finish()
            except BaseException as error:
                if isinstance(error, TooManyBad | WorkerDied | OSError | KeyboardInterrupt | SystemExit):
                    self._suspend()
                else:
                    self._discard()
                raise
        last_file = part.inputs[self._journal.file].path if part.inputs else ""
        return Report(self._journal.statistics, last_file, self._journal.file_lines, self._kept_bytes)

    def _open(self, stack: ExitStack) -> None:
        part, journal = self._part, self._journal
        dtype = token_type(part.tokenizer)
        for key, state in zip(part.settings.json_keys, journal.writers):
            if self._is_finished(part.data_set(key), state):
                Path(f"{part.data_set(key)}.doc.tmp").unlink(missing_ok=True)
            else:
                writer = IndexedDatasetWriter(part.data_set(key), dtype, state)
                self._writers.append(stack.enter_context(writer))
        temporary, final = self._quarantine_temporary, quarantine_path(part.prefix)
        if journal.quarantine_bytes and not temporary.exists() and final.exists():
            os.replace(final, temporary)  # killed after it had been given its name
        self._quarantine = stack.enter_context(open(self._quarantine_temporary, "ab"))  # noqa: SIM115
        if os.path.getsize(temporary) < journal.quarantine_bytes:
            raise ValueError(f"{temporary} is shorter than it was: start from scratch without --resume")
        self._quarantine.truncate(journal.quarantine_bytes)

    @staticmethod
    def _is_finished(prefix: str, state: WriterState) -> bool:
        """Whether a run that was killed while it gave files their names had done so for this data set."""
        if state == WriterState() or Path(f"{prefix}.bin.tmp").exists() or not Path(f"{prefix}.idx").exists():
            return False
        description = read_description(prefix)
        return description is not None and (description.documents, description.tokens) == (state[1], state[2])

    def _blocks(self) -> Iterator[Block]:
        keys = self._part.settings.json_keys
        for number, file in enumerate(self._part.inputs[self._journal.file :]):
            yield from blocks_of(file, keys, 0 if number else self._journal.blocks)

    def _write_blocks(self) -> None:
        part, journal = self._part, self._journal
        total = sum(file.size for file in part.inputs)
        progress = Progress(total, journal.statistics.read_bytes, part.settings.log_interval, part.label)
        last = time.monotonic()
        for block, result in part.pool.encode(self._blocks()):
            if result.difference:
                raise EngineDiffers(f"{block.path}, bytes {block.start} to {block.end}: {result.difference}")
            self._take(block, result)
            statistics = journal.statistics
            progress.update(statistics.read_bytes, self._writers[0].document_count, statistics.bad_lines)
            part.alive()
            if time.monotonic() - last >= SECONDS_BETWEEN_JOURNALS:
                self._save()
                self._check_on_the_way(statistics, block.path)
                last = time.monotonic()
        progress.finish()

    def _take(self, block: Block, result: Result) -> None:
        journal, inputs = self._journal, self._part.inputs
        while inputs[journal.file].path != block.path:
            journal.file += 1
            journal.blocks = journal.file_lines = 0
        statistics = journal.statistics
        file = statistics.files[block.path]
        for i, (writer, encoded) in enumerate(zip(self._writers, result.parts)):
            writer.add_documents(encoded.tokens, encoded.lengths)
            statistics.empty[i] += encoded.empty
            file.documents[i] += len(encoded.lengths)
        self._list(block.path, result.bad)
        for bad in result.bad:
            statistics.count(bad.reason, bad.lines)
        journal.blocks += 1
        journal.file_lines += result.lines
        statistics.lines += result.lines
        statistics.text_bytes += result.text_bytes
        statistics.read_bytes += block.end - block.start
        statistics.lost_bytes += result.lost_bytes
        statistics.blank_lines += result.blank
        statistics.blank_bytes += result.blank_bytes
        file.lines += result.lines
        file.bad_lines += sum(bad.lines for bad in result.bad)
        file.lost_bytes += result.lost_bytes
        if block.broken and block.broken != TOO_LONG:
            file.why = block.broken
        elif result.cut and any(file.documents):
            file.why = ENDS_WITHIN_A_LINE

    def _list(self, path: str, found: list[Bad]) -> None:
        """Append bad lines of a block to the quarantine."""

        def encoded(value: object) -> bytes:
            # A file's name may have bytes that are not UTF-8; they become JSON escapes.
            return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")

        faults: dict[tuple[str, str], bytes] = {}  # many lines have the same, and encoding takes most of the time
        entries: list[bytes] = []
        start = encoded({"file": path})[:-1]
        for line, reason, detail, lines in found:
            fault = faults.get((reason, detail))
            if fault is None:
                fault = encoded({"reason": reason, "detail": detail} if detail else {"reason": reason})[1:-1]
                faults[reason, detail] = fault
            more = b', "lines": %d' % lines if lines > 1 else b""
            entries.append(b'%b, "line": %d, %b%b}\n' % (start, self._journal.file_lines + line + 1, fault, more))
        append(self._quarantine, b"".join(entries))

    def _save(self) -> None:
        self._journal.writers = [writer.checkpoint() for writer in self._writers]
        sync_file(self._quarantine)
        self._journal.quarantine_bytes = self._quarantine.tell()
        self._journal.write(self._journal_path)

    def _finish(self) -> None:
        part = self._part
        for writer in self._writers:
            number, key = next(
                each for each in enumerate(part.settings.json_keys) if part.data_set(each[1]) == writer.prefix
            )
            source = self._journal.statistics.record(part.corpus, number)
            writer.finalize(part.settings.origin(key, part.tokenizer), source)
        if self._journal.statistics.bad:
            os.replace(self._quarantine_temporary, quarantine_path(part.prefix))
        else:
            self._quarantine_temporary.unlink()
            quarantine_path(part.prefix).unlink(missing_ok=True)
        self._journal_path.unlink()

    def _suspend(self) -> None:
        """Leave what a later run with --resume continues from, if there is a journal; else nothing."""
        if not self._journal_path.exists():
            self._discard()
            return
        for writer in self._writers:
            with contextlib.suppress(OSError):
                writer.suspend()
        if self._journal.statistics.bad:
            self._quarantine.flush()
            shutil.copyfile(self._quarantine_temporary, quarantine_path(self._part.prefix))

    def _discard(self) -> None:
        self._journal_path.unlink(missing_ok=True)
        for writer in self._writers:
            writer.abort()
        self._quarantine_temporary.unlink(missing_ok=True)
