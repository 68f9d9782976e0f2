"""vLLM for real, on its CPU or GPU build. One engine per process, so all of it shares one, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

CHECKS = Path(__file__).parents[1] / "support" / "inference" / "vllm_checks.py"


def test_engine(tiny_model: Path) -> None:
    """Every check of ``vllm_checks.py`` and ``vllm_session_checks.py``; its output names the one that failed."""
    done = subprocess.run([sys.executable, str(CHECKS), str(tiny_model)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "all checks passed" in done.stdout
