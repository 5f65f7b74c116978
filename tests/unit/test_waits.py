"""Whatever may wait for other ranks or the device says so: every call of the kind is marked, or has its reason here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Of torch.distributed: what does not wait, and what starts and ends a job, before and after a monitor watches it.
NO_WAITS = {"get_rank", "get_world_size", "is_initialized", "is_nccl_available", "group", "distributed_c10d"}
START_AND_END = {"init_process_group", "new_group", "split_group", "destroy_process_group", "rendezvous"}
ALLOWED = NO_WAITS | START_AND_END | {"_get_default_store"}
# Methods of communication under way, tensors, devices and streams.
METHODS = {"wait", "item", "cpu", "synchronize"}
# File and method: why it needs no mark.
REASONS = {
    ("training/logs/step_monitor.py", "wait"): "the monitor's own thread",
    ("training/checkpoints/folder_lock.py", "wait"): "the lock's own thread",
    ("training/heartbeat.py", "get"): "asked for before with check",
    ("training/heartbeat.py", "wait"): "the heartbeat's own threads",
    ("training/live_memory.py", "item"): "a tensor without values",
    ("training/logs/step_monitor.py", "get"): "asked for before with check",
    ("training/ending.py", "get"): "asked for before with check",
    ("training/restarts.py", "get"): "asked for before with check",
}
MARKS = "core/collectives.py"


class _Calls(ast.NodeVisitor):
    """Line and name of every call that may wait outside a block of `waiting`."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.modules = {"torch.distributed"}
        self.found: list[tuple[int, str]] = []

    def _note(self, node: ast.AST, name: str) -> None:
        self.found.append((node.lineno, name))  # type: ignore[attr-defined]

    def visit_Import(self, node: ast.Import) -> None:
        self.modules |= {a.asname for a in node.names if a.asname and a.name.startswith("torch.distributed")}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module == "torch":
            self.modules |= {alias.asname or alias.name for alias in node.names if alias.name == "distributed"}
        elif module.startswith("torch.distributed"):
            for alias in node.names:
                if alias.name[0].islower() and alias.name not in ALLOWED:
                    self._note(node, alias.name)

    def visit_With(self, node: ast.With) -> None:
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        if not any(ast.unparse(call.func) in ("waiting", "waiting.waiting") for call in calls):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        module, _, name = ast.unparse(node).rpartition(".")
        if module in self.modules or any(module.startswith(f"{each}.") for each in self.modules):
            if (
                not name[0].isupper()
                and not module.rpartition(".")[2][0].isupper()
                and name not in ALLOWED | {"__file__"}
            ):
                self._note(node, name)
        elif name in ("c10d", "_c10d_functional"):
            self._note(node, name)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called, names = ast.unparse(node.func), [ast.unparse(argument) for argument in node.args[:1]]
        if called.endswith("P2POp"):  # the kind of a message that is begun later
            return
        if called == "_marked" and self.file == MARKS:
            return
        if called == "getattr" and names[0] in self.modules:
            self._note(node, ast.unparse(node.args[1]))
        if isinstance(node.func, ast.Attribute):
            holder, method = ast.unparse(node.func.value), node.func.attr
            waits = method in METHODS and holder != "collectives" and not holder.startswith("to_host(")
            waits |= method == "get" and holder.endswith("store")
            waits |= holder.endswith("handle") and method != "set_timeout"
            if waits and (self.file, method) not in REASONS:
                self._note(node, method)
        self.generic_visit(node)


def unmarked(root: Path) -> Iterator[str]:
    """File, line and name of each such call under `root`."""
    for path in sorted(root.glob("megatron/**/*.py")):
        calls = _Calls(path.relative_to(root / "megatron").as_posix())
        calls.visit(ast.parse(path.read_text(encoding="utf-8")))
        yield from (f"{calls.file}:{line}: {name}" for line, name in calls.found)


def test_whatever_may_wait_is_marked() -> None:
    assert list(unmarked(ROOT)) == []


def test_every_reason_is_needed() -> None:
    for file, method in REASONS:
        assert f".{method}(" in (ROOT / "megatron" / file).read_text(), f"{file} has no {method} any more"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", "all_reduce"),
        ("import torch.distributed as d\nd.barrier()", "barrier"),
        ("import torch.distributed\ntorch.distributed.monitored_barrier()", "monitored_barrier"),
        ("from torch import distributed\ndistributed.send(x, 1)", "send"),
        ("from torch.distributed import P2POp, recv", "recv"),
        ("from torch.distributed.nn.functional import all_gather", "all_gather"),
        ("import torch.distributed as dist\nreduce = dist.reduce", "reduce"),
        ("import torch.distributed as dist\nfunction = getattr(dist, name)", "name"),
        ("import torch.distributed as dist\ndist.distributed_c10d.all_reduce(x)", "all_reduce"),
        ("import torch\ntorch.ops._c10d_functional.wait_tensor(x)", "_c10d_functional"),
        ("work.wait()", "wait"),
        ("group.handle.barrier()", "barrier"),
        ("store.get(key)", "get"),
        ("self._store.wait([key])", "wait"),
        ("total.item()", "item"),
        ("counts.cpu()", "cpu"),
        ("torch.cuda.synchronize()", "synchronize"),
        ("with waiting():\n    pass\nwork.wait()", "wait"),
        ("with open(path) as file:\n    work.wait()", "wait"),
    ],
)
def test_a_call_without_a_mark_is_found(tmp_path: Path, source: str, name: str) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "a.py").write_text(source)
    assert list(unmarked(tmp_path)) == [f"a.py:{len(source.splitlines())}: {name}"]


@pytest.mark.parametrize(
    "source",
    [
        "with waiting():\n    work.wait()",
        'with waiting("the device"), torch.no_grad():\n    torch.cuda.synchronize()',
        "import torch.distributed as dist\ndist.P2POp(dist.isend, x, 1)\ndist.group.WORLD\ndist.ReduceOp.MAX",
        "from megatron.core import collectives as dist\ndist.all_reduce(x)",
        "collectives.wait(work)\nsettings.get(key)\nto_host(total).item()",
        "from torch.distributed import Work\ncontrol.handle.set_timeout(t)",
    ],
)
def test_what_is_marked_or_does_not_wait_is_not_found(tmp_path: Path, source: str) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "a.py").write_text(source)
    assert list(unmarked(tmp_path)) == []
