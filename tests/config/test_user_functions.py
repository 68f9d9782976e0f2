"""Functions that a YAML names: loading by several threads, and arguments checked by a signature."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from align.config.user_functions import check_call, load_function
from tests.support import rewards
from tests.support.refusals import Refused


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


def test_arguments_are_checked_against_the_signature(refused: Refused) -> None:
    check_call(rewards.length, {"limit": 3}, "length", "score")
    check_call(rewards.anything, {"any": 1}, "anything", "score")
    check_call(functools.partial(rewards.needs_answer, answer="x"), {"other": 1}, "partial", "score")
    check_call(max, {"key": 1}, "max", "score")  # written in C
    refused(check_call, rewards.length, {"limits": 3}, "length", "score")
    refused(check_call, rewards.needs_answer, {}, "needs_answer", "score[1]")


def test_first_two_parameters_are_positional(refused: Refused) -> None:
    def odd(batch: Any, texts: Any, factor: float = 1.0) -> None: ...

    check_call(odd, {"factor": 2.0}, "odd", "score")
    refused(check_call, odd, {"texts": 2.0}, "odd", "score")
