"""Functions named in a YAML, loaded by many threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from align.config.user_functions import load_function


@pytest.fixture
def switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("switching_often")
def test_many_threads_load_one_function() -> None:
    """As the instances of a rollout's episodes do, each in a thread of its own."""
    start = threading.Barrier(16)

    def load() -> object:
        start.wait()
        # An entry that one thread removes from under another.
        sys.path_importer_cache["/nowhere"] = None  # type: ignore[assignment]
        return load_function("examples.calculator:Calculator")

    with ThreadPoolExecutor(16) as threads:
        for _ in range(20):
            classes = [thread.result() for thread in [threads.submit(load) for _ in range(16)]]
            assert len(set(classes)) == 1
