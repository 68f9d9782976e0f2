"""Slurm's commands, stood in for, and a folder to run pipelines in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.clusters import follow
from align.clusters.slurm.queue import SlurmQueue
from tests.support import toy

HERE = Path(__file__).resolve().parent
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")


@dataclass
class Slurm:
    """A stand-in of Slurm with its state in ``state``, and a folder for pipelines and a store."""

    state: Path
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "a store"

    def write(self, raw: dict[str, Any], name: str = "toy.yaml") -> str:
        (self.folder / name).write_text(yaml.safe_dump(raw, sort_keys=False))
        return name

    def align(self, *words: str, wait: bool = True) -> Any:
        """``align`` with these words, in the folder; (exit code, all it said), or its process."""
        process = subprocess.Popen(
            [sys.executable, "-m", "align.cli.main", *words, "--store", str(self.store)], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        if not wait:
            return process
        said, _ = process.communicate(timeout=280)
        return process.returncode, said

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The jobs of the stand-in by their names in Slurm."""
        found = [(path.stem, json.loads(path.read_text())) for path in sorted(self.state.glob("*.json"))]
        named = {}
        for number, job in found:
            index = number.partition("_")[2]
            named[job["options"]["job-name"] + (f"_{index}" if index else "")] = {**job, "number": number}
        return named

    def wait_until(self, what: Callable[[], Any], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.05)
        return found

    def checkpoints(self) -> int:
        return toy.steps_kept(self.store, "one")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    state, folder, programs = tmp_path / "state", tmp_path / "a folder", tmp_path / "bin"
    for path in (state, folder, programs):
        path.mkdir()
    (HERE / "stand_in.py").chmod(0o755)
    for name in COMMANDS:
        (programs / name).symlink_to(HERE / "stand_in.py")
    (state / "partitions").write_text("cpu\ngpu\n")
    (state / "hosts").write_text(socket.gethostname())
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(state))
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    monkeypatch.delenv("ALIGN_STORE", raising=False)
    monkeypatch.setattr(SlurmQueue, "every", 0.2)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    made = Slurm(state, folder)
    yield made
    for path in state.glob("*.json"):
        number = path.stem.partition("_")[0]
        subprocess.run([programs / "scancel", number], check=False)
    made.wait_until(lambda: all(job["state"] in ("COMPLETED", "FAILED", "CANCELLED") for job in made.jobs().values()))
