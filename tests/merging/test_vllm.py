"""What schedules, averages, replay and merges leave behind runs in vLLM with transformers' log-probabilities."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "vllm_merge_checks.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_checkpoints_run_in_vllm(tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own; the output names the checkpoint that failed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(CHECKS), str(tiny_model), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "all checks passed" in done.stdout
