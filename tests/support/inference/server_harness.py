"""What the tests of the server engine share: an engine at a stand-in, and patience with an end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from align.config.runtime import EngineConfig
from align.config.runtime.rollouts import RolloutsConfig
from align.inference.servers.server import ServerEngine
from align.inference.servers.server_options import ServerSpec
from align.inference.weights import WeightsFolder, checkpoint_weights

PROMPTS = [[1, 30 + i, 31] for i in range(12)]


def served_at(
    model_dir: Path, addresses: list[str], dtype: torch.dtype = torch.float32, servers: int = 1, **config: Any
) -> ServerSpec:
    """What servers are asked for, each with four calls under way; without an address they are started here."""
    pool = {name: config.pop(name) for name in list(config) if name in RolloutsConfig.model_fields}
    settings = {"timeout": 30, "batch_size": 4} | config
    return ServerSpec.of(
        model_dir,
        device=torch.device("cpu"),
        dtype=dtype,
        config=EngineConfig(**settings),
        pool=RolloutsConfig(servers=0 if addresses else servers, addresses=addresses, **pool),
        max_length=64,
        seed=0,
    )


def open_at(model_dir: Path, address: str | None, dtype: torch.dtype = torch.float32, **config: Any) -> ServerEngine:
    """One server, which is given the checkpoint's weights where it was running. Patient: cores may be busy."""
    served = served_at(model_dir, [] if address is None else [address], dtype, **config)
    folder = WeightsFolder(served)
    engine = ServerEngine(served, folder)
    if address is not None:
        engine.load_weights(checkpoint_weights(served.model_dir))
    return engine


@contextmanager
def soon(seconds: float = 15.0) -> Iterator[None]:
    """Whatever happens inside has ended after so many seconds, where idle cores take one or two."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> None:
    """Wait until it is so, for a while."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)
