"""Stages run in the test's process, where a process of their own is not what the test is about.

A stage's process imports torch and transformers anew, which takes longer than most stages of a test.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

from align.runner import worker
from align.runner.stage_process import Tail
from align.runner.stage_result import RESULT, read_attempts, read_result, read_work, write_attempts
from align.store.artifacts import EVENTS, LOG


def run_attempt(
    name: str, partial: Path, follow: Callable[[dict[str, Any]], None], *_: Any, **__: Any
) -> dict[str, Any]:
    """Run the stage laid out in ``partial`` here: replaces ``align.runner.stage_process.run_attempt``.

    Its output goes to its log and its events to ``follow``, after its end. It cannot be stopped, and it trains in one
    process. Torch's number of threads is as before afterwards.
    """
    events, attempts, started = Tail(partial / EVENTS), read_attempts(partial), time.time()
    threads = torch.get_num_threads()
    try:
        with (
            (partial / LOG).open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            print(f"--- {name}")
            with _messages_to(log):
                result = worker._outcome(partial, read_work(partial).model_dump(), started, RESULT)
            worker._finish(partial, RESULT, result)
    finally:
        torch.set_num_threads(threads)
    for event in events.read():
        follow(event)
    write_attempts(partial, [*attempts, round(time.time() - started, 2)])
    return read_result(partial / RESULT).model_dump()


@contextlib.contextmanager
def stages() -> Iterator[None]:
    """Run the stages of pipelines in this process, which has torch and transformers already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.runner.run_stage.run_attempt", run_attempt)
        patch.setattr("align.runner.runner._forked_stages", lambda *_: contextlib.nullcontext())
        yield


@contextlib.contextmanager
def _messages_to(log: TextIO) -> Iterator[None]:
    """Write align's log messages to ``log`` as well, as the worker's own process does."""
    logger, handler = logging.getLogger("align"), logging.StreamHandler(log)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
