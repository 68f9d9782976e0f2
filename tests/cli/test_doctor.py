"""What ``align doctor`` says of the engines."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from align.cli import doctor
from align.inference.server_process import MODULE

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
    engine, server = doctor._engine()
    assert (engine.level, engine.text) == ("ok", "engine vllm, in process")
    assert server.level == "ok"
    assert server.text == f"servers (runtime.rollouts): python -m {MODULE}, each with its own Unix socket and key"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(BROKEN, "ModuleNotFoundError: No module named 'x'"), (subprocess.TimeoutExpired("x", 180), "not within 180 s")],
)
def test_a_server_that_does_not_import_is_noted(broken: dict[str, Any], error: Any, reason: str) -> None:
    broken[MODULE] = error
    engine, server = doctor._engine()
    assert engine.level == "ok"
    assert (server.level, server.text) == (
        "note",
        f"no rollout servers (runtime.rollouts): {MODULE} does not import ({reason})",
    )


def test_a_machine_without_sockets_is_noted(broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(family: int) -> None:
        raise OSError("Address family not supported")

    monkeypatch.setattr(socket, "socket", unsupported)
    assert doctor._engine()[1] == doctor.Finding(
        "note",
        "no rollout servers (runtime.rollouts): no Unix socket can be opened (Address family not supported)",
    )


def test_a_vllm_that_does_not_import_is_a_problem(broken: dict[str, Any]) -> None:
    broken["vllm"] = BROKEN
    (finding,) = doctor._engine()
    assert finding.level == "problem"
    assert "No module named 'x'" in finding.text
