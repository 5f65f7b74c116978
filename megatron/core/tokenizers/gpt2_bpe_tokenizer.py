"""GPT-2's byte-level byte-pair encoding from vocab.json and merges.txt."""

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex

from megatron.core.text_files import read_object, read_text
from megatron.core.tokenizers import Tokenizer
from megatron.core.tokenizers.settings import checked_size

END_OF_TEXT = "<|endoftext|>"
_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_CACHED_WORD_LENGTH = 64
_CACHED_WORDS = 1 << 18


def bytes_to_characters() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's files: itself, or one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        table.setdefault(byte, chr(256 + len(table) - len(printable)))
    return table


class GPT2BPETokenizer(Tokenizer):
    """GPT-2's tokenizer; `<|endoftext|>` ends documents and is never read out of a text."""

    kind, file_format = "GPT2BPETokenizer", "gpt2"
    added_tokens = (END_OF_TEXT,)

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        self.paths = [Path(vocab_file), Path(merge_file)]
        for flag, path in zip(("--vocab-file", "--merge-file"), self.paths):
            if not path.is_file():
                raise FileNotFoundError(f"{flag} {path} does not exist")
        self._ids = read_object(self.paths[0])
        if not all(type(token) is int and token >= 0 for token in self._ids.values()):
            raise ValueError(f"{vocab_file} must be a JSON object of pieces and their ids")
        self.vocab_size = checked_size(self.paths[0], self._ids.values())
        self._characters = bytes_to_characters()
        self._bytes = {character: byte for byte, character in self._characters.items()}
        self._tokens = {token: piece for piece, token in self._ids.items()}
        missing = [piece for piece in (*self._bytes, END_OF_TEXT) if piece not in self._ids]
        if missing:
            raise ValueError(f"{vocab_file} lacks {missing[0]!r}, which byte-level encoding needs")
        self._byte_ids = [self._ids[self._characters[byte]] for byte in range(256)]
        self._merges = self._read_merges(self.paths[1])
        self._cache: dict[str, list[int]] = {}
        self.eod = self._ids[END_OF_TEXT]

    def _read_merges(self, path: Path) -> dict[tuple[int, int], tuple[int, int]]:
        """(left id, right id) -> (rank, merged id)."""
        merges: dict[tuple[int, int], tuple[int, int]] = {}
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip() or (number == 1 and line.startswith("#version")):
                continue
            pieces = line.rstrip("\r").split(" ")
            try:
                left, right = pieces
                merge = (self._ids[left], self._ids[right]), (len(merges), self._ids[left + right])
            except (KeyError, ValueError):
                raise ValueError(f"{path}, line {number}: {line!r} is not a merge of two vocabulary pieces") from None
            merges.setdefault(*merge)
        return merges

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in _WORDS.findall(text):
            merged = self._cache.get(word)
            if merged is None:
                merged = self._merge([self._byte_ids[byte] for byte in word.encode("utf-8")])
                if len(word) <= _CACHED_WORD_LENGTH and len(self._cache) < _CACHED_WORDS:
                    self._cache[word] = merged
            ids += merged
        return ids

    def _merge(self, ids: list[int]) -> list[int]:
        """Apply the lowest-ranked merge, leftmost first, until none applies; O(n log n) however long the word."""
        following = [*range(1, len(ids) + 1)]
        preceding = [*range(-1, len(ids) - 1)]
        queue: list[tuple[int, int, int, int, int]] = []

        def offer(position: int) -> None:
            after = following[position]
            if after < len(ids) and (merge := self._merges.get((ids[position], ids[after]))):
                heapq.heappush(queue, (merge[0], position, merge[1], ids[position], ids[after]))

        for position in range(len(ids) - 1):
            offer(position)
        while queue:
            _, position, merged, left, right = heapq.heappop(queue)
            after = following[position]
            # An earlier merge may have consumed either side since this one was offered.
            if ids[position] != left or after >= len(ids) or ids[after] != right:
                continue
            ids[position], ids[after] = merged, -1
            following[position] = following[after]
            if following[after] < len(ids):
                preceding[following[after]] = position
            offer(position)
            if preceding[position] >= 0:
                offer(preceding[position])
        return [token for token in ids if token >= 0]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        pieces = (self._tokens[int(token)] for token in ids)
        raw = bytearray()
        for piece in pieces:
            if piece == END_OF_TEXT:
                raw += piece.encode()
            else:
                raw += bytes(self._bytes[character] for character in piece)
        return raw.decode("utf-8", errors="replace")


def gpt2_tokenizer_json(vocab_file: Path, merge_file: Path, end_of_text: int | None = None) -> str:
    """The tokenizer.json of GPT-2's two files; with the id of `<|endoftext|>` other programs read it out of texts."""
    merges = read_text(merge_file).split("\n")
    if merges[0].startswith("#version"):
        del merges[0]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": read_object(vocab_file),
        "merges": [line.rstrip("\r").split(" ") for line in merges if line.strip()],
    }  # fmt: skip
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [] if end_of_text is None else [{"id": end_of_text, "content": END_OF_TEXT, **flags}]
    content: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip
    return json.dumps(content)
