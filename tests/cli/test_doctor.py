"""What ``align doctor`` says of the engines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from align.cli import doctor
from align.inference.servers.server_process import MODULE
from align.models.compute.costs import ProductSpeed

BROKEN = "Traceback\nModuleNotFoundError: No module named 'x'\n"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules that do not import, and what comes of trying; every other one does."""
    modules: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> Any:
        module = command[-1].removeprefix("import ")
        if isinstance(modules.get(module), Exception):
            raise modules[module]
        return SimpleNamespace(returncode=int(module in modules), stderr=modules.get(module, ""))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", run)
    return modules


def test_both_ways_to_vllm_are_named(broken: dict[str, Any]) -> None:
    engine, server = list(doctor._engine(import_engines=True))
    assert (engine.level, engine.text) == ("ok", "engine vllm, in process")
    assert server.level == "ok"
    assert server.text == f"servers (runtime.rollouts): python -m {MODULE}, each with its own Unix socket and key"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(BROKEN, "ModuleNotFoundError: No module named 'x'"), (subprocess.TimeoutExpired("x", 180), "not within 180 s")],
)
def test_a_server_that_does_not_import_is_noted(broken: dict[str, Any], error: Any, reason: str) -> None:
    broken[MODULE] = error
    engine, server = list(doctor._engine(import_engines=True))
    assert engine.level == "ok"
    assert (server.level, server.text) == (
        "note",
        f"no rollout servers (runtime.rollouts): {MODULE} does not import ({reason})",
    )


def test_a_machine_without_sockets_is_noted(broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(family: int) -> None:
        raise OSError("Address family not supported")

    monkeypatch.setattr(socket, "socket", unsupported)
    assert list(doctor._engine(import_engines=True))[1] == doctor.Finding(
        "note",
        "no rollout servers (runtime.rollouts): no Unix socket can be opened (Address family not supported)",
    )


def test_a_vllm_that_does_not_import_is_a_problem(broken: dict[str, Any]) -> None:
    broken["vllm"] = BROKEN
    (finding,) = list(doctor._engine(import_engines=True))
    assert finding.level == "problem"
    assert "No module named 'x'" in finding.text


def test_without_engines_vllm_is_not_imported(broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    broken["vllm"] = AssertionError("vLLM was imported")
    monkeypatch.setattr(doctor, "_unmet_requirement", lambda: None)
    (finding,) = doctor._engine(import_engines=False)
    assert (finding.level, "--engines" in finding.text) == ("ok", True)


@pytest.mark.parametrize(
    ("torch_version", "problem"),
    [("2.13.0+cpu", None), ("2.14.1", "it requires torch==2.13.*, and torch 2.14.1 is installed")],
)
def test_a_torch_that_vllm_was_not_built_for_is_a_problem(
    broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch, torch_version: str, problem: str | None
) -> None:
    versions = {"vllm": "0.31.0", "torch": torch_version}
    requirements = ["numpy", "torch==2.13.*", "torch==9; platform_system == 'Plan9'", "torch==8; extra == 'zen'"]
    monkeypatch.setattr(doctor, "version_of", versions.get)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    (finding,) = doctor._engine(import_engines=False)
    assert finding.level == ("ok" if problem is None else "problem")
    assert problem is None or problem in finding.text


def test_lines_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes no time is yielded before torch is imported."""
    monkeypatch.setattr(doctor, "_torch", lambda: pytest.fail("torch was imported first"))
    texts = []
    with pytest.raises(pytest.fail.Exception, match="torch was imported first"):
        for finding in doctor.examine():
            texts.append(finding.text)
    assert any(text.startswith("Python 3") for text in texts)
    assert any("GiB free" in text for text in texts)


@pytest.mark.parametrize(("version", "level"), [((3, 10), "note"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "note")])
def test_untested_python_is_noted(version: tuple[int, int], level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (*version, 1))
    finding = next(doctor._packages())
    assert finding.level == level
    assert ("tested with Python 3.11, 3.12 and 3.13" in finding.text) == (level == "note")


@pytest.mark.parametrize(("version", "is_problem"), [("2.11.0", True), ("2.11.0+cpu", False), (None, False)])
def test_cuda_torchaudio_next_to_cpu_torch_is_a_problem(
    version: str | None, is_problem: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = ProductSpeed(bfloat16=14.0, float32=134.0)
    setup = SimpleNamespace(cuda_devices=[], threads=2, cpu_capability="AVX2", is_cpu_build=True, cpu_speed=speed)
    monkeypatch.setattr("align.models.compute.precision.torch_setup", lambda: setup)
    monkeypatch.setattr(doctor, "version_of", {"torchaudio": version}.get)
    findings = doctor._torch()
    products = "precision auto computes in float32 here (float32 134 GFLOP/s, bfloat16 14)"
    assert any(finding.level == "ok" and products in finding.text for finding in findings)
    problems = [finding.text for finding in findings if finding.level == "problem"]
    expected = ["torchaudio is a CUDA build but torch is a CPU build: pip uninstall -y torchaudio"]
    assert problems == (expected if is_problem else [])
