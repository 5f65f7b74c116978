"""The record of how far a run has come, from which --resume goes on after a kill."""

from dataclasses import dataclass
from pathlib import Path

from megatron.core.atomic_files import atomic_writer
from megatron.core.datasets.indexed_dataset_writer import WriterState
from tools.preprocessing.records import seal, unseal
from tools.preprocessing.statistics import Statistics

VERSION = 3


@dataclass
class Journal:
    """Where a run is: the first `blocks` blocks of file number `file`, and all files before it, are on disk."""

    fingerprint: str
    writers: list[WriterState]
    statistics: Statistics
    file: int = 0
    blocks: int = 0
    file_lines: int = 0
    """Lines of the blocks of file number `file`."""
    quarantine_bytes: int = 0

    def write(self, path: Path) -> None:
        """Write it, whole or not at all; what it tells of must be on disk already."""
        with atomic_writer(path) as out:
            out.write(seal({"version": VERSION, **vars(self)}))


def journal_path(prefix: str) -> Path:
    """The journal of the run that writes to `prefix`."""
    return Path(f"{prefix}_resume.json")


def read_journal(prefix: str) -> Journal | None:
    """The journal of an interrupted run, or None. Raises ValueError if it is not one."""
    path = journal_path(prefix)
    try:
        content = unseal(path.read_bytes())
        if content.pop("version") != VERSION:
            raise ValueError("it has another version")
        content["writers"] = [WriterState(*state) for state in content["writers"]]
        content["statistics"] = Statistics.from_record(content["statistics"])
        return Journal(**content)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): start without --resume") from None
