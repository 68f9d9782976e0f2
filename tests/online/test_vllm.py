"""Checkpoints of trainers without a critic in vLLM, each in a process of its own: an engine is one a process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from align.tuning import LoraTuning
from tests.online.conftest import METHODS


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("method", METHODS)
def test_vllm_runs_what_was_saved(make_online, tmp_path, method):
    trainer = make_online(
        method, tuning=LoraTuning(rank=8, alpha=16), updates=3, rollout_batch=16, learning_rate=1e-2
    )  # fmt: skip
    trainer.train()
    folder = tmp_path / "out" / "model"
    trainer.save_model(str(folder))
    command = [sys.executable, "-m", "tests.online.vllm_checks", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "equal within" in done.stdout
