"""What the tests of the server engine share: an engine at a stand-in, and patience with an end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from align.rollouts.server import ServerEngine
from align.runtime import EngineConfig

PROMPTS = [[1, 30 + i, 31] for i in range(12)]


def open_at(model_dir: Path, address: str | None, dtype: torch.dtype = torch.float32, **config: Any) -> ServerEngine:
    """An engine that has four calls under way; without an address it starts a server. Patient: cores may be busy."""
    settings = {"name": "vllm-server", "address": address, "timeout": 30, "batch_size": 4} | config
    return ServerEngine(
        model_dir,
        device=torch.device("cpu"),
        dtype=dtype,
        config=EngineConfig(**settings),
        max_length=64,
        seed=0,
    )


@contextmanager
def soon(seconds: float = 8.0) -> Iterator[None]:
    """Whatever happens inside has ended after so many seconds: one or two on idle cores."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> None:
    """Wait until it is so, for a while."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)
