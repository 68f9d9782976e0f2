"""Modules that tests fork run as ``python -m`` runs them, and tell how they end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.runner.fork_server import OFF, ForkServer
from tests.support.fork_server import Forking, start_module

pytestmark = pytest.mark.skipif(not ForkServer.is_possible(), reason="only Linux forks a process with its libraries")


def test_arguments_variables_and_output(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    statement = "import os, sys; print(os.environ['ALIGN_A'], 'torch' in sys.modules)"
    assert start_module("timeit", ["-n1", "-r1", statement], log, ALIGN_A="given").wait(60) == 0
    assert log.read_text().startswith("given True\n")


def test_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert start_module("timeit", ["-n1", "-r1", "1 / 0"], log).wait(60) == 1
    assert "ZeroDivisionError" in log.read_text()
    assert start_module("no_such_module", [], log).wait(60) == 1
    assert "No module named no_such_module" in log.read_text()


@pytest.mark.parametrize("forks", ["1", "0"])
def test_forking_accepts_options_of_subprocess(forks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF, forks)
    command = [sys.executable, "-m", "timeit", "-n1", "-r1", "print('a line'); 1 / 0"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": 60}
    done: subprocess.CompletedProcess[str] = Forking().run(command, **options)
    assert done.returncode == 1
    assert "a line" in done.stderr and "ZeroDivisionError" in done.stderr
