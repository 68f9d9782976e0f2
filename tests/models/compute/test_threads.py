"""Threads and device from the runtime block."""

from __future__ import annotations

import os

import pytest
import torch

from align.config.runtime import Runtime
from align.errors import UserError
from align.models.compute.threads import device_of, use_threads
from align.pipeline.process_limits import usable_cores


def test_threads_from_the_runtime_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        assert use_threads(Runtime(threads=3)) == torch.get_num_threads() == 3
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert use_threads(Runtime()) == torch.get_num_threads() == usable_cores()
    finally:
        torch.set_num_threads(before)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(Runtime()).type == "cpu"
    with pytest.raises(UserError, match=r"runtime\.device is cuda"):
        device_of(Runtime(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(Runtime()).type == "cuda"
    assert device_of(Runtime(device="cpu")).type == "cpu"
