"""Real text without a download: what Python ships about itself (docs) and its own sources (code)."""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

DOMAINS = ("docs", "code")
SHORTEST = 200
"""Characters below which a text is not worth a document."""


def standard_library() -> list[Path]:
    """The standard library's modules and packages in alphabetical order, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def split_source(source: str) -> tuple[str, str]:
    """The documentation in a Python source (docstrings, each under its name) and the source without it.

    Raises SyntaxError or ValueError if it is no Python source.
    """
    documentation = []
    lines: list[str | None] = list(source.split("\n"))
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        documentation.append(text + "\n" if isinstance(node, ast.Module) else f"{node.name}\n\n{text}\n")
        statement = node.body[0]
        first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
        # A body that is nothing but its docstring would no longer be Python without it.
        is_whole_body = len(node.body) == 1 and not isinstance(node, ast.Module)
        # as in `class Empty: "Nothing." ; x = 1`
        is_on_its_line = getattr(node, "lineno", 0) == statement.lineno
        shares_a_line = is_on_its_line or any(first < other.lineno <= last for other in node.body[1:])
        if not is_whole_body and not shares_a_line:
            lines[first:last] = [None] * (last - first)
    return "\n".join(documentation), "\n".join(line for line in lines if line is not None).lstrip()


def documents() -> Iterator[tuple[str, str]]:
    """Every document as (domain, text)."""
    for _, text in sorted(topics.items()):
        yield "docs", text
    for path in standard_library():
        try:
            documentation, code = split_source(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        yield "docs", documentation
        yield "code", code


def write_corpus(folder: Path, characters: int, files: int = 12) -> dict[str, int]:
    """Writes `folder`/DOMAIN/0.jsonl, 1.jsonl, ... and returns each domain's size in characters.

    The documents are shuffled with a fixed seed, so that the end of a domain, which --split gives to validation, is
    like the rest of it. `characters` is the most of each domain; the same Python gives the same files.
    """
    texts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    for domain, text in documents():
        if len(text) >= SHORTEST:
            texts[domain].append(text)
    sizes = {}
    for domain, all_texts in texts.items():
        random.Random(0).shuffle(all_texts)
        chosen, sizes[domain] = [], 0
        for text in all_texts:
            if sizes[domain] + len(text) <= characters:
                chosen.append(text)
                sizes[domain] += len(text)
        if len(chosen) < files:
            raise ValueError(f"this Python ships too little text for the demo: {len(chosen)} documents of {domain}")
        (folder / domain).mkdir(parents=True)
        share = -(-len(chosen) // files)
        for number in range(files):
            part = chosen[number * share : (number + 1) * share]
            path = folder / domain / f"{number}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
    return sizes


def read_corpus(folder: Path) -> Iterator[str]:
    """The texts under `folder`, all domains one after the other."""
    for domain in DOMAINS:
        for path in sorted((folder / domain).glob("*.jsonl"), key=lambda path: int(path.stem)):
            with path.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)["text"]
