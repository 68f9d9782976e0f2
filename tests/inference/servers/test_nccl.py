"""Weights over NCCL: the way they go, checked in a process of its own, and what is refused before anything starts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from align.config.runtime import Runtime
from align.config.runtime.rollouts import RolloutsConfig
from align.errors import UserError
from align.inference.engine import open_engine
from tests.support.fork_server import start_module
from tests.support.inference.fake_server import FakeServer, info
from tests.support.inference.server_harness import open_at


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_way_of_weights(tiny_model: Path, tmp_path: Path) -> None:
    """Every check of ``nccl_checks.py``; its output names the one that failed."""
    log = tmp_path / "log.txt"
    process = start_module("tests.support.inference.nccl_checks", [str(tiny_model)], log, vllm=True)
    assert process.wait(timeout=240) == 0, log.read_text()[-4000:]
    assert "all checks passed" in log.read_text()


def test_a_trainer_without_cuda_is_refused(tiny_model: Path, fake: FakeServer) -> None:
    rollouts = RolloutsConfig(weights="nccl", addresses=[fake.address])
    runtime = Runtime(device="cpu", rollouts=rollouts)
    with pytest.raises(UserError, match="weights is nccl, but the trainer has no CUDA device"):
        open_engine(tiny_model, runtime, precision="float32", max_length=64, seed=0, warn=print)
    assert fake.calls == []


@pytest.mark.parametrize("offered", [None, {"backend": "ipc"}])
def test_a_server_that_was_not_started_for_it_is_refused(tiny_model: Path, fake: FakeServer, offered: Any) -> None:
    actual = info()
    actual["vllm_config"]["weight_transfer_config"] = offered
    fake.answers["/server_info"] = lambda body: actual
    with pytest.raises(UserError, match="has no weight transfer over NCCL") as caught:
        open_at(tiny_model, fake.address, weights="nccl")
    assert """--weight-transfer-config '{"backend": "nccl"}'""" in str(caught.value)
    assert fake.paths() == ["/server_info"]


def test_vllm_is_needed_on_the_trainers_side(
    tiny_model: Path, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.inference.servers.server_options.is_offered", lambda config: True)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", None)
    monkeypatch.setitem(sys.modules, "vllm.distributed", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vLLM's sender does not import here"):
        open_at(tiny_model, fake.address, weights="nccl")
