"""Stand-ins for vLLM's server, and engines at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.inference.fake_server import FakeServer

if TYPE_CHECKING:
    from align.inference.servers.pool import PoolEngine
    from align.inference.servers.server import ServerEngine


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A healthy server until a test says otherwise."""
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture
def served(fake: FakeServer, tiny_model: Path) -> Iterator[ServerEngine]:
    """An engine at ``fake``, which has forgotten the calls that opened it."""
    from tests.support.inference.server_harness import open_at

    engine = open_at(tiny_model, fake.address)
    fake.calls.clear()
    yield engine
    engine.close()


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    """Two healthy servers until a test says otherwise."""
    two = [FakeServer(), FakeServer()]
    yield two
    for entry in two:
        entry.stop()


@pytest.fixture
def warnings() -> list[str]:
    """What the pool warned of."""
    return []


@pytest.fixture
def opened(fakes: list[FakeServer], tiny_model: Path, warnings: list[str]) -> Iterator[Callable[..., PoolEngine]]:
    """Opens a pool at ``fakes``, which then have forgotten the calls that opened it."""
    from align.inference.servers.pool import PoolEngine
    from tests.support.inference.server_harness import served_at

    pools: list[PoolEngine] = []

    def open_pool(**settings: Any) -> PoolEngine:
        pool = PoolEngine(served_at(tiny_model, [fake.address for fake in fakes], **settings), warnings.append)
        pools.append(pool)
        for fake in fakes:
            fake.calls.clear()
        return pool

    yield open_pool
    for pool in pools:
        pool.close()
