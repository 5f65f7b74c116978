"""Small JSON records that a run leaves for a later one, with a checksum: what can be read is what was written."""

import json
import zlib
from typing import Any


def seal(content: dict[str, Any]) -> bytes:
    """A record as it is written; dataclasses in it become objects."""
    text = json.dumps(content, default=vars)
    return f'{text[:-1]}, "checksum": {zlib.crc32(text.encode())}}}'.encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The content of a record. Raises ValueError if it is damaged or was changed."""
    text, mark, checksum = data.rpartition(b', "checksum": ')
    if not mark or checksum != f"{zlib.crc32(text + b'}')}}}".encode():
        raise ValueError("its checksum does not match")
    return json.loads(text + b"}")
