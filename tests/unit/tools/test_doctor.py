"""The doctor names what is wrong, with a remedy, and ends with status 1 for what keeps training from running."""

import os
import resource
import socket
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.core.fusions import compiling
from tools import doctor
from tools.doctor_checks import folder, hardware, network, software
from tools.doctor_checks.finding import Finding
from tools.gpu_checks.commands import ROOT, TORCHRUN, Ran

RIGHT = Ran(("x",), 0, "collective\tall_reduce\t1\t0.5\t2.0\ncollective\tall_to_all\t1\t0.5\t3.0\n", 1.0)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "run_together", lambda *_: [RIGHT])
    monkeypatch.setattr(folder, "_WRITTEN", 1 << 20)
    for name in software._VARIABLES:
        monkeypatch.delenv(name, raising=False)


def statuses(findings: object) -> dict[str, str]:
    found = list(findings)  # type: ignore[call-overload]
    assert all(isinstance(each, Finding) and bool(each.remedy) == (each.status != "ok") for each in found)
    return {each.subject: each.status for each in found}


def test_every_line_has_a_status_and_the_last_one_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.main(["--folder", str(tmp_path), "--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning"} and last.startswith("0 problems, ")
    for subject in ("Python", "torch", "C++ kernels", "operations", "checkpoints", "clock", "host name", "gloo"):
        assert sum(subject in line for line in lines) == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor.main(["--folder", str(tmp_path), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "problem  environment    TRITON_INTERPRET=1: " in out and "unset TRITON_INTERPRET" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_torch_does_not_find(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.main(["--device", "cuda"]) == 1
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54\nGCC version\n")
    monkeypatch.setattr(hardware, "_DRIVER", tmp_path / "version")
    assert doctor.main(["--folder", str(tmp_path)]) == 1
    assert "a driver is there (NVRM version: NVIDIA UNIX x86_64 Kernel Module 550.54)" in capsys.readouterr().out


def test_gpus_that_are_taken_apart_or_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="A GPU", major=9, minor=0)
    free = {0: 79 << 30, 1: 40 << 30}
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda number: properties,
        "mem_get_info": lambda number: (free[number], 80 << 30),
        "can_device_access_peer": lambda one, other: joined,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    outcome = [RuntimeError("in\nmany lines\nno gcc")]

    def compile_one(*_: object) -> None:
        if outcome:
            raise outcome[0]

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(compiling, "swiglu", compile_one)
    joined = False
    found = statuses(hardware.check_gpus(4))
    assert found == {
        "GPU 0": "ok", "GPU 1": "warning", "GPUs": "problem", "GPU links": "warning", "compiling": "problem",
    }  # fmt: skip
    joined, free[1] = True, 79 << 30
    outcome.clear()
    assert set(statuses(hardware.check_gpus(2)).values()) == {"ok"}
    properties.major = 7
    assert statuses(hardware.check_gpus(2))["GPU 0"] == "warning"


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_SHARED_MEMORY", tmp_path)
    for blocks, files, locked, expected in (
        (1 << 12, 1024, 1 << 16, {"shared memory": "warning", "open files": "warning", "locked memory": "warning"}),
        (1 << 30, resource.RLIM_INFINITY, resource.RLIM_INFINITY, {"shared memory": "ok", "open files": "ok"}),
    ):
        monkeypatch.setattr(os, "statvfs", lambda _, blocks=blocks: SimpleNamespace(f_bavail=blocks, f_frsize=4096))
        limits = {resource.RLIMIT_NOFILE: (1024, files), resource.RLIMIT_MEMLOCK: (0, locked)}
        monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
        assert statuses(hardware.check_limits(gpus=True)) == {"CPU": "ok", **expected}


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(hardware.check_clock()) == {"clock": "ok"}
    monkeypatch.setattr(hardware.time, "time", lambda: 1e9)
    assert statuses(hardware.check_clock()) == {"clock": "warning"}


def test_versions_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for torch_version, status in (("2.10.1", "problem"), ("2.11.0", "ok"), ("2.13.0+cpu", "ok"), ("3.0.0", "warning")):
        monkeypatch.setattr(torch, "__version__", torch_version)
        assert statuses(software.check_versions())["torch"] == status
    versions = {"numpy": "2", "transformers": "5", "apex": "0.9.10.dev0"}
    monkeypatch.setattr(software, "version", lambda package, _: versions.get(package))
    assert statuses(software.check_packages()) == {
        "numpy": "ok", "transformers": "ok", "sentencepiece": "problem", "TE": "ok", "apex": "warning",
    }  # fmt: skip
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: name == "apex.normalization" or None)
    assert statuses(software.check_packages())["apex"] == "ok"


def test_the_folder_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(folder, "_MOUNTS", mounts)
    monkeypatch.setattr(folder, "_SLOW", 0.0)
    inner = tmp_path / "a b" / "inner"
    inner.mkdir(parents=True)
    escaped = str(inner.parent).replace(" ", "\\040")
    mounts.write_text(f"one / ext4 rw 0 0\ntwo {escaped} nfs4 rw 0 0\nthree {escaped}/in xfs rw 0 0\n")
    assert folder.file_system(inner) == "nfs4" and folder.file_system(tmp_path) == "ext4"
    missing = inner / "to" / "come"
    (found,) = folder.check_folder(missing)
    assert found.status == "ok" and f"{missing}: nfs4, " in found.text and not list(inner.iterdir())
    mounts.write_text("one / tmpfs rw 0 0\n")
    assert statuses(folder.check_folder(inner)) == {"checkpoints": "warning"}
    mounts.unlink()
    monkeypatch.setattr(folder, "_SLOW", 1e18)
    assert statuses(folder.check_folder(inner)) == {"checkpoints": "warning"}
    monkeypatch.setattr(folder, "_SLOW", 0.0)
    monkeypatch.setattr(folder.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    assert statuses(folder.check_folder(inner)) == {"checkpoints": "ok", "file locks": "warning"}
    (tmp_path / "file").touch()
    assert statuses(folder.check_folder(tmp_path / "file")) == {"checkpoints": "problem"}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    (found,) = folder.check_folder(inner)
    assert found.status == "problem" and "No space left on device" in found.text


def test_the_name_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in network._INTERFACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    assert statuses(network.check_name(several=False)) == {"host name": "ok"}
    assert statuses(network.check_name(several=True)) == {"host name": "warning"}

    def unknown(_: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert statuses(network.check_name(several=False)) == {"host name": "problem"}
    for name in network._INTERFACES:
        monkeypatch.setenv(name, "eth0")
    assert statuses(network.check_name(several=False)) == {"host name": "ok"}


def test_collectives_that_fail_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = network.check_collectives("cpu", 2)
    assert found.text == "2 collectives of 2 processes are right (all_reduce 2.0 GB/s, all_to_all 3.0 GB/s)"
    for ran, words in (
        (Ran(("x",), 1, "RuntimeError: no interface\n", 1.0), "ended with status 1 (RuntimeError: no interface)"),
        (Ran(("x",), None, "", 150.0), "stopped after 150 s"),
        (Ran(("x",), 0, "", 1.0), "ended with status 0"),
    ):
        monkeypatch.setattr(network, "run_together", lambda *_, ran=ran: [ran])
        (found,) = network.check_collectives("cuda", 8)
        assert (found.status, found.subject) == ("problem", "NCCL") and words in found.text


@pytest.mark.slow
def test_under_torchrun_the_processes_of_all_machines_talk(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--nproc-per-node", "2", str(ROOT / "tools" / "doctor.py"), "--folder", str(tmp_path)]
    ran = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "ok       connection     2 processes on 1 machine add up their ranks over gloo" in ran.stdout
    assert ran.stdout.count("checkpoints") == 1
