"""The pages: readable lines, links and files that are there, both READMEs of one structure, figures in one place."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron.core
from megatron.training.arguments import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINE_LIMIT = 120
MEASURED = re.compile(r"\d\s*(?:[MG]B/s|[GT]FLOP/s|tokens a second|m?s\b|seconds|minutes|times as|[秒倍]|分钟|毫秒)")

# Flags of pip, srun, sbatch, scancel, torchrun and py-spy.
FOREIGN = set(
    "--cpus-per-task --extra-index-url --gpus-per-node --job-name --label --max-restarts --nnodes --no-deps --nodes "
    "--nproc-per-node --ntasks --ntasks-per-node --numa-binding --pid --pty --rdzv-backend --requeue --signal --target "
    "--time".split()
)


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of the lines outside of fenced blocks, which hold what programs print."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def long_lines(text: str) -> list[int]:
    """Numbers of the lines that are too long."""
    return [number for number, line in prose(text) if len(line) > LINE_LIMIT]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = (line.lstrip("#").strip().lower() for _, line in prose(text) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Targets of the links within the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(line for _, line in prose(text)))
    return [target for target in targets if "://" not in target]


def dead_links(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    dead = []
    for target in links(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            dead.append(target)
    return dead


def missing_files(text: str) -> list[str]:
    """Files of this project that a text names and that are not there."""
    named = re.findall(r"(?<![\w./])(?:megatron|core|training|tools|tests|docs)/[\w./-]+\.\w+", text)
    return sorted({name for name in named if not any((start / name).exists() for start in (ROOT, ROOT / "megatron"))})


def structure(text: str) -> list[str]:
    """What a translation must leave as it is: levels of headings, shapes of lists and tables, commands, links."""
    kept, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        if fenced:
            kept.append(line.partition("  #")[0].rstrip())
        elif match := re.match(r"#+ |[-*] |\d+\. |\|", line):
            kept.append(match.group() + "|" * line.count("|"))
    return kept + [target for target in links(text) if not target.startswith("README")]


def first_table(text: str) -> list[str]:
    """Rows of a page's first table, without its head."""
    match = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert match is not None
    return match.group(1).splitlines()


def test_there_are_pages() -> None:
    assert {"README.md", "README.zh-CN.md", "CONTRIBUTING.md", "benchmarks.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_readable_and_links_lead_somewhere(page: Path) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []
    assert dead_links(page) == []
    assert missing_files(page.read_text(encoding="utf-8")) == []


def test_what_is_wrong_with_a_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](page.md#one-two) [b](#one-two) [c](#three) [d](gone.md)\n", encoding="utf-8")
    assert dead_links(page) == ["#three", "gone.md"]
    assert missing_files("`core/config.py` python tools/data.py, (training/gone.py) /data/tools/x.py") == [
        "training/gone.py"
    ]
    assert long_lines("x" * 121 + "\n```\n" + "x" * 121 + "\n```\n" + "x" * 121) == [1, 5]


def test_the_translation_has_the_structure_of_the_readme() -> None:
    ours, theirs = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert structure(ours) == structure(theirs)
    for change in (
        ("--append-eod", "--append-bos"),
        ("docs/moe.md", "docs/data.md"),
        ("\n- ", "\n"),
        ("\n###", "\n##"),
    ):
        assert change[0] in theirs and structure(ours) != structure(theirs.replace(*change, 1))


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readmes_leave_measured_figures_to_the_benchmarks(name: str) -> None:
    assert MEASURED.findall((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("figure", ["46 MB/s", "in 2.2 s", "took 109 seconds", "用时 2.2 秒", "10 倍", "2 分钟"])
def test_a_measured_figure_is_found(figure: str) -> None:
    assert MEASURED.search(figure)


def flags(text: str) -> set[str]:
    """All flags in a text, with dashes."""
    return {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}


def test_the_flags_of_the_pages_exist() -> None:
    known = FOREIGN | flags(" ".join(build_parser()._option_string_actions))
    for path in ROOT.glob("tools/**/*.py"):
        known |= flags(path.read_text(encoding="utf-8"))
    unknown = {page.name: flags(page.read_text(encoding="utf-8")) - known for page in PAGES}
    assert {page: sorted(names) for page, names in unknown.items() if names} == {}
    assert flags("`--append-eods 3`, --json_keys") - known == {"--append-eods"}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "docs/clusters.md"])
def test_the_variables_of_the_pages_are_the_scripts(name: str) -> None:
    script = (ROOT / "mixtral_4x7b_example.sh").read_text(encoding="utf-8")
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL) if "example.sh" in block]
    rows = [line for line in text.splitlines() if re.match(r"\|.*`\w+=", line)]
    given = set(re.findall(r"\b([A-Z][A-Z_]+)=", "\n".join(blocks + rows)))
    assert given and given - {"SRUN_CPUS_PER_TASK"} <= set(re.findall(r"\b([A-Z][A-Z_]+):=", script))


def test_the_readme_links_every_page() -> None:
    linked = set(links((ROOT / "README.md").read_text(encoding="utf-8")))
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md", "docs/benchmarks_log.md"}
    assert pages - linked == set()


def test_the_benchmarks_begin_with_a_short_table() -> None:
    assert 1 < len(first_table((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))) <= 10


def test_the_changelog_has_the_version_of_the_package() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None and sections[:2] == ["Unreleased", version.group(1)]


def test_the_map_of_the_core_names_every_part() -> None:
    folder = ROOT / "megatron" / "core"
    named = set(re.findall(r"^    (\w+(?:, \w+)*)  ", megatron.core.__doc__ or "", re.MULTILINE))
    parts = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {part for names in named for part in names.split(", ")} == parts - {"__init__"}
