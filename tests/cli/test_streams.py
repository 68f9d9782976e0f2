"""What becomes of a command whose output is closed, full or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.store.store import Store
from tests.support import toy

FULL = Path("/dev/full")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy.pipeline(), sort_keys=False))
    return path


def start(*words: str, stdout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "align.cli.main", *words], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False,
    )  # fmt: skip


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("json", [[], ["--json"]], ids=["text", "json"])
def test_run_with_closed_output_writes_its_page(file: Path, tmp_path: Path, json: list[str]) -> None:
    done = start("run", str(file), "--store", str(tmp_path / "store"), *json, stdout=closed_pipe())
    assert (done.returncode, done.stderr) == (0, "")
    assert len(Store.open(tmp_path / "store").all()) == 3
    assert (tmp_path / "store" / "reports" / "toy" / "report.html").is_file()


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_run_with_full_output_reports_it(file: Path, tmp_path: Path) -> None:
    with FULL.open("w") as full:
        done = start("run", str(file), "--store", str(tmp_path / "store"), stdout=full.fileno())
        assert done.returncode == 0
        assert done.stderr == "standard output cannot be written (No space left on device); the rest of it is lost.\n"
        assert len(Store.open(tmp_path / "store").all()) == 3
        listed = start("list", "--store", str(tmp_path / "store"), stdout=full.fileno())
        assert (listed.returncode, listed.stderr.count("\n")) == (1, 1)


def test_commands_that_only_print_end_quietly(tmp_path: Path) -> None:
    Store.open(tmp_path / "store")
    for words in (["list"], ["list", "--json"], ["gc"]):
        done = start(*words, "--store", str(tmp_path / "store"), stdout=closed_pipe())
        assert (done.returncode, done.stderr) == (0, "")
    assert start("--help", stdout=closed_pipe()).stderr == ""


def test_a_command_may_begin_without_an_output(file: Path, tmp_path: Path) -> None:
    words = f'"{sys.executable}" -m align.cli.main run "{file}" --store "{tmp_path / "store"}" >&-'
    done = subprocess.run(
        ["sh", "-c", words], stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(Store.open(tmp_path / "store").all()) == 3
