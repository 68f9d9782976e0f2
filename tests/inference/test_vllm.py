"""vLLM for real, on its CPU or GPU build. One engine per process, so all of it shares one, in a process of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.fork_server import start_module
from tests.support.inference.vllm_families import compared_in_vllm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def test_engine(tiny_model: Path, tmp_path: Path) -> None:
    """Every check of ``vllm_checks.py`` and ``vllm_session_checks.py``; its output names the one that failed."""
    log = tmp_path / "log.txt"
    process = start_module("tests.support.inference.vllm_checks", [str(tiny_model)], log, vllm=True)
    assert process.wait(timeout=240) == 0, log.read_text()[-4000:]
    assert "all checks passed" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "olmoe"])
def test_weights_of_mixtures_follow_the_trainer(model_type: str, tmp_path: Path) -> None:
    """vLLM fuses and packs experts anew at every load; a stale one would sample another policy."""
    result = compared_in_vllm(model_type, tmp_path)
    start, first, second, reloaded = result["differences"]
    assert result["dtype"] == "float32"
    assert max(start, reloaded) < 1e-5 and max(first, second) < 1e-4, result


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["granitemoehybrid", "falcon_h1", "mamba2"])
def test_weights_of_hybrids_follow_the_trainer(model_type: str, tmp_path: Path) -> None:
    """Convolutions that an update does not reach differ by 0.1 nats and more."""
    result = compared_in_vllm(model_type, tmp_path)
    assert result["dtype"] == "bfloat16"
    assert max(result["differences"]) < 0.05, result


@pytest.mark.slow
def test_convolutions_of_another_width_are_refused(tmp_path: Path) -> None:
    assert "convolutions of width 4 only" in compared_in_vllm("lfm2", tmp_path)["message"]
