"""A stand-in for vLLM's server, and an engine at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.inference.fake_server import FakeServer

if TYPE_CHECKING:
    from align.inference.server import ServerEngine


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
