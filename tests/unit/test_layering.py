"""Who may import whom: the layers of docs/architecture.md, checked on the syntax tree of every source file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each part of megatron/core, and the other parts of it (or single modules of those) that it may import.
LEAVES = {"config", "stages", "atomic_files", "recompute", "text_files", "waiting"}
PARALLEL = LEAVES | {"parallel_state", "collectives"}
CORE_IMPORTS: dict[str, set[str]] = {
    "stages": set(),
    "recompute": set(),
    "microbatch": {"fusions.attention"},
    "config": {"stages", "config_checks"},
    "config_checks": set(),
    "atomic_files": {"text_files"},
    "text_files": set(),
    "host_memory": set(),
    "waiting": set(),
    "collectives": {"waiting"},
    "parallel_state": LEAVES | {"collectives"},
    "fusions": LEAVES,
    "datasets": LEAVES,
    "tokenizers": LEAVES,
    "interchange": PARALLEL | {"tensor_parallel", "models"},
    "dist_checkpointing": PARALLEL | {"interchange.folder_kind"},
    "tensor_parallel": PARALLEL | {"fusions"},
    "context_parallel": PARALLEL | {"fusions"},
    "pipeline_parallel": {"parallel_state", "collectives"},
    "distributed": PARALLEL | {"microbatch", "tensor_parallel.parameter", "host_memory"},
    "optimizer": PARALLEL
    | {"config_checks", "microbatch", "fusions", "distributed", "tensor_parallel.parameter", "host_memory"},
    "transformer": PARALLEL | {"microbatch", "fusions", "tensor_parallel", "context_parallel"},
    "models": PARALLEL | {"microbatch", "fusions", "tensor_parallel", "context_parallel", "transformer"},
}
MODELS = {path.parent.name for path in ROOT.glob("megatron/core/models/*/__init__.py")}
KERNELS = "megatron/core/fusions/kernels/"
CHOOSES_KERNELS = "megatron/core/fusions/forms.py"
SHOWS_KERNELS = {"tools/show_forms.py"}
ENVIRONMENT_READER = "megatron/training/environment.py"
ARGUMENTS = "megatron/training/arguments.py"
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}


def imported_modules(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a module imports; a from-import yields module.name for each name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def environment_uses(tree: ast.Module) -> Iterator[int]:
    """Lines that reach for the process environment through the os module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_NAMES:
            if isinstance(node.value, ast.Name) and node.value.id == "os":
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in ENVIRONMENT_NAMES)


def forbidden_import(file: str, module: str) -> str | None:
    """Why `file` (a path inside the project) may not import `module`, or None if it may."""
    top, _, rest = module.partition(".")
    in_core = file.startswith("megatron/core/")
    if top == "triton" and not file.startswith(f"{KERNELS}triton/"):
        return f"only {KERNELS}triton imports triton"
    if (
        f"{module}.".startswith("megatron.core.fusions.kernels.")
        and file not in SHOWS_KERNELS
        and not (file == CHOOSES_KERNELS or file.startswith(KERNELS))
    ):
        return f"only {CHOOSES_KERNELS} knows kernels: operations hold a formula"
    # The interchange checkpoint holds an argparse.Namespace: there it is a data type, not a command line.
    is_file_format = module == "argparse.Namespace" and file.startswith("megatron/core/interchange/")
    if top == "argparse" and file.startswith("megatron/") and file != ARGUMENTS and not is_file_format:
        return f"within megatron, only {ARGUMENTS} imports argparse"
    if top in ("tools", "pretrain_gpt") and file.startswith("megatron/"):
        return "the library does not import tools or the training script"
    if top == "tests":
        return "only tests import tests"
    if top != "megatron":
        return None
    part, _, inner = rest.partition(".")
    if part == "training" and (in_core or file.startswith("tools/")):
        return "neither the core nor the tools import megatron.training"
    named = part == "core" and any(f"{inner}.".startswith(f"models.{model}.") for model in MODELS)
    if named and file.startswith("megatron/training/"):
        return "the training program is given its model by the training script"
    if part != "core" or not in_core:
        return None
    importer = Path(file).parts[2].removesuffix(".py")
    imported = inner.split(".")[0]
    allowed = CORE_IMPORTS.get(importer, set())
    if importer == "__init__":
        return "megatron/core/__init__.py imports no part of the core"
    if importer not in CORE_IMPORTS:
        return f"megatron/core/{importer} has no place in CORE_IMPORTS (tests/unit/test_layering.py) yet"
    if imported and imported != importer and not any(f"{inner}.".startswith(f"{name}.") for name in allowed):
        return f"megatron.core.{importer} may import only {sorted(allowed)} of the core"
    return None


def violations(root: Path) -> list[str]:
    """Every breach of the layering under `root`, as 'file:line: module: reason'."""
    found = []
    files = [*root.glob("megatron/**/*.py"), *root.glob("tools/**/*.py"), *root.glob("*.py")]
    for path in sorted(files):
        file = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), file)
        package = ".".join(path.relative_to(root).parts[:-1])
        for line, module in imported_modules(tree, package):
            if reason := forbidden_import(file, module):
                found.append(f"{file}:{line}: {module}: {reason}")
        if file.startswith("megatron/") and file != ENVIRONMENT_READER:
            found += [
                f"{file}:{line}: os: only {ENVIRONMENT_READER} reads the environment" for line in environment_uses(tree)
            ]
    return found


def test_the_project_keeps_its_layers() -> None:
    assert list(ROOT.glob("megatron/**/*.py")), "no source files found"
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("megatron/core/datasets/a.py", "from megatron.core.parallel_state import ProcessGroups"),
        ("megatron/core/datasets/a.py", "from megatron.core import parallel_state"),
        ("megatron/core/datasets/a.py", "from .. import parallel_state"),
        ("megatron/core/datasets/a.py", "from ..parallel_state import ProcessGroups"),
        ("megatron/core/datasets/deeper/a.py", "from ...parallel_state import ProcessGroups"),
        ("megatron/core/fusions/a.py", "from megatron.core.microbatch import Microbatch"),
        ("megatron/core/fusions/a.py", "def f():\n    import megatron.core.parallel_state"),
        ("megatron/core/pipeline_parallel/a.py", "from megatron.core.transformer.mlp import MLP"),
        ("megatron/core/optimizer/a.py", "import megatron.core.models.mixtral.mixtral_model as m"),
        ("megatron/core/distributed/a.py", "from megatron.core.transformer import attention"),
        ("megatron/core/distributed/a.py", "from megatron.core.tensor_parallel import layers"),
        ("megatron/core/interchange/a.py", "from argparse import ArgumentParser"),
        ("megatron/core/datasets/a.py", "from argparse import Namespace"),
        ("megatron/core/transformer/a.py", "from megatron.core.models.mixtral import mixtral_model"),
        ("megatron/core/config.py", "import megatron.training.arguments"),
        ("megatron/core/config.py", "import importlib\nimportlib.import_module('megatron.training')"),
        ("megatron/core/newcomer/a.py", "from megatron.core.config import ModelConfig"),
        ("megatron/core/transformer/a.py", "import tools.checkpoint.util"),
        ("megatron/training/training.py", "import pretrain_gpt"),
        ("megatron/training/a/b.py", "from megatron.core.models.mixtral.weights import mixtral_weights"),
        ("megatron/training/training.py", "from megatron.core.models import mixtral"),
        ("megatron/training/training.py", "import megatron.core.models.mixtral.mixtral_model as m"),
        ("megatron/training/training.py", "from argparse import Namespace"),
        ("megatron/training/training.py", "import os\nx = os.environ['RANK']"),
        ("megatron/core/config.py", "from os import getenv"),
        ("megatron/core/fusions/rms_norm.py", "import triton.language as tl"),
        ("megatron/core/fusions/kernels/cpu/wrapper.py", "import triton.language as tl"),
        ("megatron/core/fusions/rms_norm.py", "from megatron.core.fusions.kernels.triton import rms_norm"),
        ("megatron/core/fusions/rms_norm.py", "from megatron.core.fusions import kernels"),
        ("megatron/core/fusions/rms_norm.py", "from .kernels import cpu"),
        ("megatron/core/transformer/a.py", "import megatron.core.fusions.kernels.cpu.wrapper as w"),
        ("tools/benchmarks/a.py", "from megatron.core.fusions.kernels import load"),
        ("tools/preprocess_data.py", "from megatron.training.training import pretrain"),
        ("tools/preprocess_data.py", "from megatron import training"),
        ("pretrain_gpt.py", "import tests.helpers"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n", encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:{len(source.splitlines())}: ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("megatron/core/fusions/kernels/triton/rms_norm.py", "import triton\nimport triton.language as tl"),
        ("megatron/core/fusions/forms.py", "from megatron.core.fusions.kernels import load"),
        ("megatron/core/fusions/rms_norm.py", "from megatron.core.fusions.forms import operation"),
        ("megatron/core/datasets/a.py", "from megatron.core.config import DataConfig\nfrom .b import c"),
        ("megatron/core/models/mixtral/a.py", "from ...transformer.moe import router"),
        ("megatron/core/distributed/a.py", "from megatron.core.tensor_parallel.parameter import spec_of"),
        ("megatron/core/interchange/a.py", "from argparse import Namespace"),
        ("megatron/training/training.py", "from megatron.core.models.common import ModelChunks"),
        ("megatron/training/environment.py", "import os\nrank = os.environ['RANK']"),
        ("megatron/training/arguments.py", "import argparse"),
        ("tools/preprocess_data.py", "import argparse, os\nos.environ.get('A')\nfrom megatron.core.datasets import x"),
        ("pretrain_gpt.py", "from megatron.training import pretrain\nfrom megatron.core.models import mixtral"),
    ],
)
def test_what_is_allowed_stays_allowed(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n", encoding="utf-8")
    assert violations(tmp_path) == []


def asks_for_a_format(tree: ast.Module) -> list[int]:
    """Lines that compare something with a value of --ckpt-format, or look for the files of a format."""
    values = {
        "torch",
        "torch_dist",
        "mp_rank_*",
        "rank_*.safetensors",
        "sharded",
        "sharded.json",
        "metadata.json",
        "*.distcp",
    }
    asking = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) or (isinstance(node, ast.Call) and "glob" in ast.unparse(node.func))
    )
    return sorted({
        part.lineno
        for node in asking
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in values
    })  # fmt: skip


def test_only_the_table_tells_checkpoint_formats_apart() -> None:
    files = [*ROOT.glob("megatron/training/**/*.py"), *ROOT.glob("tools/checkpoint/*.py")]
    asking = [path.name for path in files if asks_for_a_format(ast.parse(path.read_text(encoding="utf-8")))]
    assert asking == ["config.py"], "how a folder is told is in folder_kind.py; that --async-save needs one, in config"


@pytest.mark.parametrize(
    "source", ["x = flag == 'torch'", "x = y if 'torch_dist' in flag else z", "x = any(folder.glob('mp_rank_*'))"]
)
def test_a_question_for_the_format_is_found(source: str) -> None:
    assert asks_for_a_format(ast.parse(source)) == [1] and not asks_for_a_format(ast.parse("x = {'torch': 1}"))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_pages_name_are_there(page: str) -> None:
    named = set(re.findall(r"`((?:[\w.]+/)+[\w.]+)`", (ROOT / page).read_text()))
    starts = [ROOT, ROOT / "megatron", ROOT / "megatron" / "core", ROOT / "megatron" / "core" / "fusions"]
    missing = sorted(name for name in named if not any((start / name).exists() for start in starts))
    assert named and not missing
