"""Slurm's commands, stood in for, and a folder to run pipelines in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.clusters import follow
from align.clusters.slurm_submit import SlurmQueue
from tests.support.clusters.slurm.cluster import Slurm

REPOSITORY = Path(__file__).resolve().parents[3]
SUPPORT = REPOSITORY / "tests" / "support" / "clusters" / "slurm"
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    state, folder, programs = tmp_path / "state", tmp_path / "a folder", tmp_path / "bin"
    for path in (state, folder, programs):
        path.mkdir()
    (SUPPORT / "stand_in.py").chmod(0o755)
    for name in COMMANDS:
        (programs / name).symlink_to(SUPPORT / "stand_in.py")
    (state / "partitions").write_text("cpu\ngpu\n")
    (state / "hosts").write_text(socket.gethostname())
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(state))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("ALIGN_STORE", raising=False)
    monkeypatch.setattr(SlurmQueue, "every", 0.2)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    new_slurm = Slurm(state, folder)
    yield new_slurm
    for path in state.glob("*.json"):
        number = path.stem.partition("_")[0]
        subprocess.run([programs / "scancel", number], check=False)
    new_slurm.wait_until(
        lambda: all(job["state"] in ("COMPLETED", "FAILED", "CANCELLED") for job in new_slurm.jobs().values())
    )
