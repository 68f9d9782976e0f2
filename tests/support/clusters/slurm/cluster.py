"""The stand-in of Slurm as tests use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support import toy


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
        output, _ = process.communicate(timeout=280)
        return process.returncode, output

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The jobs of the stand-in by their names in Slurm."""
        values = [(path.stem, json.loads(path.read_text())) for path in sorted(self.state.glob("*.json"))]
        named = {}
        for number, job in values:
            index = number.partition("_")[2]
            named[job["options"]["job-name"] + (f"_{index}" if index else "")] = {**job, "number": number}
        return named

    def wait_until(self, condition: Callable[[], Any], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while not (actual := condition()):
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.05)
        return actual

    def checkpoints(self) -> int:
        return toy.steps_kept(self.store, "one")
