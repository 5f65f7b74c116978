"""A sentencepiece model as the tokenizer.json that gigatoken reads.

gigatoken's own conversion takes half a second for 32,000 pieces, most of it in reading them one field at a time. Here
it converts the model without its pieces, and these are put in afterwards.
"""

import json
import re
import struct
from typing import Any, NamedTuple

import numpy as np

# The fields of a piece in the order in which they are nearly always written: text, score, type.
_PIECE = re.compile(rb"\x0a(.)(.*)\x15(.{4})(?:\x18(.))?", re.DOTALL)
_PIECES_TAG = 0x0A
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


class Piece(NamedTuple):
    """An entry of the vocabulary; `kind` as in sentencepiece's file format."""

    text: str
    score: float
    kind: int


def sentencepiece_json(model: bytes) -> str:
    """The tokenizer.json of a BPE model with byte fallback, in which `</s>` in a text is, as in sentencepiece, text.

    Raises ImportError without gigatoken and ValueError for a model that it cannot run.
    """
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    messages, others = _cut(model)
    if not messages:
        raise ValueError("not a sentencepiece model: no pieces found")
    content: dict[str, Any] = json.loads(sentencepiece_to_tokenizer_json(_field(messages[0]) + others))
    pieces = [_piece(message) for message in messages]
    template = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] = [
        {"id": i, "content": piece.text, **template} for i, piece in enumerate(pieces) if piece.kind == _USER_DEFINED
    ]
    content["model"]["vocab"] = {piece.text: i for i, piece in enumerate(pieces)}
    content["model"]["merges"] = _merges(pieces)
    return json.dumps(content)


def _cut(model: bytes) -> tuple[list[bytes], bytes]:
    """The messages of the pieces, and the other fields as they are. Raises ValueError if it is no such file."""
    pieces, others = [], []
    position = 0
    while position < len(model):
        start = position
        length, position = _varint(model, position + 1)
        if model[start] & 7 != 2 or position + length > len(model):
            raise ValueError("not a sentencepiece model")
        position += length
        if model[start] == _PIECES_TAG:
            pieces.append(model[position - length : position])
        else:
            others.append(model[start:position])
    return pieces, b"".join(others)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    result = shift = 0
    while position < len(data):
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise ValueError("not a sentencepiece model")


def _field(message: bytes) -> bytes:
    size, head = len(message), bytearray([_PIECES_TAG])
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(head) + bytes([size]) + message


def _piece(message: bytes) -> Piece:
    match = _PIECE.fullmatch(message)
    if match and match[1][0] == len(match[2]) < 0x80:
        return Piece(match[2].decode(), struct.unpack("<f", match[3])[0], match[4][0] if match[4] else _NORMAL)
    from gigatoken._load.sentencepiece import _scalars

    try:
        fields: dict[int, Any] = _scalars(message)
        score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
        return Piece(fields.get(1, b"").decode(), score, fields.get(3, _NORMAL))
    except (AttributeError, IndexError, TypeError, struct.error):  # fields of other types than a piece's
        raise ValueError("not a sentencepiece model") from None


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every division of a piece into two pieces, in the order in which sentencepiece would merge: by score, descending.

    Equal scores are ordered as transformers' `generate_merges` orders them: by the lengths of left and right,
    descending, then as the pieces are.
    """
    texts = {piece.text for piece in pieces}
    merges: list[tuple[str, str]] = []
    scores: list[float] = []
    for text, score, kind in pieces:
        if kind == _CONTROL:
            continue
        for i in range(1, len(text)):
            if (left := text[:i]) in texts and (right := text[i:]) in texts:
                merges.append((left, right))
                scores.append(score)
    left_lengths, right_lengths = (np.array([len(pair[side]) for pair in merges]) for side in (0, 1))
    order = np.lexsort((-right_lengths, -left_lengths, -np.array(scores)))
    return [merges[i] for i in order.tolist()]
