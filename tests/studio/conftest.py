"""Fixtures of the studio's tests: a store with a finished and a failed run of toy stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from align import Pipeline
from align.errors import StageFailed
from align.runner.runner import run_pipeline
from tests.support import toy
from tests.support.studio.client import open_client


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a store with the runs ``toy``, which is finished, and ``broken``; read-only by agreement."""
    store = tmp_path_factory.mktemp("studio") / "store"
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    with pytest.raises(StageFailed):
        run_pipeline(Pipeline(toy.pipeline(two={"crash": "bug"}) | {"name": "broken"}), store=store)
    return store


@pytest.fixture
def client(toy_store: Path) -> TestClient:
    """A client with the cookie."""
    return open_client(toy_store)
