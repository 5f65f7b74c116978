"""What a file is, by its name and by its first bytes: the one place that knows endings and formats."""

import json
import os
import re
from typing import NamedTuple

HEAD_BYTES = 8192
_TEXT_ENDINGS = (".json", ".jsonl", ".ndjson", ".jsonlines")
_COMPRESSION_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
_ENDINGS = (*_TEXT_ENDINGS, *(text + end for text in _TEXT_ENDINGS for end in _COMPRESSION_ENDINGS), ".parquet")
ENDINGS_IN_WORDS = ", ".join(_TEXT_ENDINGS) + " (also with " + ", ".join(_COMPRESSION_ENDINGS) + "), .parquet"

TEXT, PARQUET, UNREADABLE = "text", "parquet", "unreadable"
_COMPRESSIONS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
_LFS = "a Git LFS pointer, not the file itself: run git lfs pull where it was cloned"
_LFS_POINTER = re.compile(rb"(?s)version https://git-lfs\..{0,1000}?\nsize (\d{1,18})\n")
_ADVICE = {
    _LFS: rb"version https://git-lfs\.",
    "an HTML page, as a failed download leaves it: fetch the file again": rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doc|html)",
    "an XML document, as a failed download leaves it: fetch the file again": rb"(?:\xef\xbb\xbf)?\s*<\?xml",
    "a tar archive: unpack it": rb"(?s).{257}ustar",
    "a zip archive: unpack it": rb"PK\x03\x04",
    "a 7z archive: unpack it": rb"7z\xbc\xaf\x27\x1c",
    "UTF-16 text: convert it (iconv -f UTF-16 -t UTF-8)": rb"\xff\xfe|\xfe\xff|\{\0\s*\0?\"\0|\0\{\0\s*\0?\"",
    "a Parquet file: give it the ending .parquet, without compression around it": rb"PAR1",
}
_FOREIGN = [(words, re.compile(pattern)) for words, pattern in _ADVICE.items()]
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b"))
_BEGIN_OF_OBJECT = re.compile(rb"(?:^|\n)\s*\{\s*\"")
# The quarantine, the journal, a rank's status, the description and training's metrics, as this project writes them.
_PRODUCTS = re.compile(
    rb'\{"file": "(?:[^"\\]|\\.)*", "line": \d+, "reason": "[^"]*"(?:\}|, "detail": )'
    rb'|\{"version": \d+, "fingerprint": "[0-9a-f]+", "writers": '
    rb'|\{"state": "\w+", "run": "[0-9a-f]{32}", "beat": '
    rb'|\{\s*"version": \d+,\s*"key": (?:null|"(?:[^"\\]|\\.)*"),\s*"tokenizer": \{\s*"type"'
    rb'|\{"iteration": \d+, "consumed_samples": \d+, "\w+_loss": '
    rb"|MMIDIDX\0\0"
)


class Kind(NamedTuple):
    """How a file is read: as TEXT, as one of the compressions of it, as PARQUET; UNREADABLE with what it is."""

    reading: str
    what: str = ""
    size: int = 0
    """Of a Git LFS pointer, bytes of the file that it stands for."""


def is_corpus_name(path: str) -> bool:
    """Whether a file of this name, found in a folder, is meant as input."""
    return path.lower().endswith(_ENDINGS)


def ending(path: str) -> str:
    """What to count a skipped file under: its ending in small letters, both parts of .tar.gz."""
    stem, last = os.path.splitext(os.path.basename(path).lower())
    inner = os.path.splitext(stem)[1] if last in _COMPRESSION_ENDINGS else ""
    return inner + last or "no ending"


def is_product_name(path: str) -> bool:
    """Whether a file is a data set's, or temporary; asks for the other file of a data set, opens none."""
    stem, last = os.path.splitext(path)
    other = {".bin": ".idx", ".idx": ".bin"}.get(last)
    return last == ".tmp" or (other is not None and any(os.path.exists(stem + other + end) for end in ("", ".tmp")))


def read_head(path: str) -> bytes | None:
    """The first bytes of a file, enough to tell what it is; None for a rank's file that has just been removed."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except FileNotFoundError:
        if path.endswith(("_resume.json", "_status.json")):
            return None
        raise


def is_product(head: bytes) -> bool:
    """Whether this begins a file that this project wrote, other than tokens, which look like anything."""
    return _PRODUCTS.match(head) is not None


def compression_of(head: bytes) -> str | None:
    """The compression of a file that begins so."""
    return next((name for name, magic in _COMPRESSIONS.items() if magic.match(head)), None)


def kind_of(path: str, head: bytes) -> Kind:
    """How a file of this name that begins with `head` is read; the content counts, not the ending."""
    if compression := compression_of(head):
        return Kind(compression)
    if head.startswith(b"PAR1"):
        return Kind(PARQUET)
    if not head and path.lower().endswith((*_COMPRESSION_ENDINGS, ".parquet")):
        return Kind(UNREADABLE, "an empty file, which its kind never is: fetch it again")
    if pointer := _LFS_POINTER.match(head):
        return Kind(UNREADABLE, _LFS, int(pointer[1]))
    if what := foreign(head):
        # A Parquet file is known by its end as well, which its reader looks at.
        binary = what == BINARY and path.lower().endswith(".parquet")
        return Kind(PARQUET) if binary else Kind(UNREADABLE, what)
    looks_like_text = not head or _BEGIN_OF_OBJECT.search(head)
    return Kind(TEXT if looks_like_text or not path.lower().endswith(".parquet") else PARQUET)


BINARY = "binary data of no kind that is read here"


def foreign(head: bytes) -> str | None:
    """What a text is that is none of a corpus, and what to do; None for what may be lines of JSON."""
    for words, pattern in _FOREIGN:
        if pattern.match(head):
            return words
    if compression := compression_of(head):
        return f"{compression} within another compression: decompress it once"
    controls = len(head) - len(head.translate(None, _CONTROL))
    # Holes of zeros, which a crash leaves, may have good lines behind them.
    is_binary = controls > len(head) // 20 and head.strip(b"\0") and not _BEGIN_OF_OBJECT.search(head)
    return BINARY if is_binary else None


def printable(path: str) -> str:
    """A name for the terminal: control characters and bytes that are no UTF-8 as escapes."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in path)
