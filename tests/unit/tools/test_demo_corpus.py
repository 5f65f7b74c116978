"""The demo's corpus: documentation and sources taken apart, and the files they are written to."""

import ast
import json
from pathlib import Path

import pytest

from tools.demo import corpus

SOURCE = '''"""About the module."""
import os

class Empty:
    """Only this."""

class Full:
    """About the class.

    In two paragraphs.
    """
    x = "\x0c"  # a form feed is no line break

    async def method(self):
        """About the method."""
        return 1

def short(): "On one line."; return 2

def plain():
    return """not documentation"""
'''


def test_documentation_is_taken_out_of_the_source() -> None:
    documentation, code = corpus.split_source(SOURCE)
    assert documentation.startswith("About the module.\n")
    for part in ("Full\n\nAbout the class.\n\nIn two paragraphs.\n", "method\n\nAbout the method.\n", "Only this."):
        assert part in documentation
    assert "not documentation" not in documentation
    for part in ("About the", "two paragraphs"):
        assert part not in code
    for part in ('"""Only this."""', '"On one line."', "return 1", "return 2", '"""not documentation"""', "\x0c"):
        assert part in code
    assert len(ast.parse(code).body) == len(ast.parse(SOURCE).body) - 1


def test_every_module_of_this_python_stays_python_without_its_documentation() -> None:
    modules = [path for path in corpus.standard_library() if path.parent.name in ("json", "email", "asyncio")]
    assert len(modules) > 20
    for path in modules:
        documentation, code = corpus.split_source(path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(code, str(path))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                assert len(node.body) == 1, f"{path}: {node.name} still has its documentation"
                assert node.name in documentation


@pytest.fixture
def small_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def documents() -> list[tuple[str, str]]:
        texts = [(domain, f"{domain} {number} " + "é" * 300) for number in range(40) for domain in corpus.DOMAINS]
        return [*texts, ("docs", "too short")]

    monkeypatch.setattr(corpus, "documents", documents)


@pytest.mark.usefixtures("small_python")
def test_each_domain_is_a_folder_of_numbered_files(tmp_path: Path) -> None:
    sizes = corpus.write_corpus(tmp_path, 310 * 30, files=11)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "docs"]
    for domain in corpus.DOMAINS:
        assert {path.name for path in (tmp_path / domain).iterdir()} == {f"{number}.jsonl" for number in range(11)}
        lines = [line for path in (tmp_path / domain).iterdir() for line in path.read_text("utf-8").splitlines()]
        texts = [json.loads(line)["text"] for line in lines]
        assert len(set(texts)) == len(texts) == 30
        assert all(text.startswith(domain) for text in texts)
        assert sizes[domain] == sum(map(len, texts)) <= 310 * 30
    assert len(list(corpus.read_corpus(tmp_path))) == 60


@pytest.mark.usefixtures("small_python")
def test_the_corpus_is_the_same_every_time_and_shuffled(tmp_path: Path) -> None:
    for name in ("first", "second"):
        corpus.write_corpus(tmp_path / name, 100_000)
    first, second = (list(corpus.read_corpus(tmp_path / name)) for name in ("first", "second"))
    assert first == second
    numbers = [int(text.split()[1]) for text in first if text.startswith("docs")]
    assert sorted(numbers) == list(range(40)) and numbers != sorted(numbers)


@pytest.mark.usefixtures("small_python")
def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too little text"):
        corpus.write_corpus(tmp_path, 1000, files=12)
