"""The version of the extension: a checksum of everything that it and its wrapper are made of.

setup.py runs this file by itself, before anything of the package can be imported.
"""

import hashlib
from pathlib import Path


def checksum() -> str:
    """Of the C++ sources and the Python files that lie beside this one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.iterdir()):
        if path.suffix in (".cpp", ".h", ".py"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
