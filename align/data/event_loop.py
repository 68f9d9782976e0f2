"""Calls of users' functions: their time limit, and an asyncio loop in a separate thread for async ones. Torch-free.

The loop outlives a call, so a client which a function opens once, with its connections, serves every batch.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from types import FrameType, TracebackType
from typing import Any

from align.patches.signatures import frame_of
from align.pipeline.context import duration
from align.pipeline.process_limits import alarm

_starting = threading.Lock()
"""Held by who looks for the loop: threads that begin at the same time would start one each."""


class CallTimeout(TimeoutError):
    """A user's function did not return in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"did not return within {duration(seconds)}, its timeout")


class _OutOfTime(BaseException):
    """The time is over. Not an ``Exception``, because functions catch those and try again."""


def call_within(seconds: float | None, function: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
    """Return a function's result. Raises ``CallTimeout``, with the line at which it hangs, after ``seconds``.

    A call that holds the interpreter's lock without reading signals cannot be ended.
    """
    if seconds is None:
        return function(*inputs, **arguments)
    if threading.current_thread() is threading.main_thread():
        try:
            with alarm(seconds, _OutOfTime):
                return function(*inputs, **arguments)
        except _OutOfTime as error:
            raise CallTimeout(seconds).with_traceback(error.__traceback__) from None
    # Other threads receive no signals: such a call is left to a thread that does not keep the process alive.
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function(*inputs, **arguments))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="score function", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise CallTimeout(seconds).with_traceback(_traceback(frame_of(thread)))
    return result.result()


def _traceback(frame: FrameType | None) -> TracebackType | None:
    """Return a traceback of what a thread does."""
    traceback = None
    while frame is not None:
        traceback = TracebackType(traceback, frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return traceback


async def await_within(seconds: float | None, awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable. Raises ``CallTimeout`` after ``seconds``."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError as error:
        if seconds is None or not limit.expired():
            raise  # the awaitable's own
        raise CallTimeout(seconds).with_traceback((error.__cause__ or error).__traceback__) from None


def wait_for(awaitable: Awaitable[Any], seconds: float | None = None) -> Any:
    """Return the result of an awaitable, which runs in the process's loop; its exception is raised here.

    Raises ``CallTimeout`` if a function blocks the loop for ``seconds``.
    """
    future = start(awaitable)
    while True:
        try:
            return future.result(seconds)
        except TimeoutError:
            if seconds is None or future.done():
                raise
        turned = threading.Event()
        _loop(os.getpid()).call_soon_threadsafe(turned.set)
        if not turned.wait(seconds):
            raise CallTimeout(seconds)


def start(awaitable: Awaitable[Any]) -> Future[Any]:
    """Run an awaitable in the process's loop; the future may be cancelled from any thread."""

    async def run() -> Any:
        return await awaitable

    with _starting:
        loop = _loop(os.getpid())
    return asyncio.run_coroutine_threadsafe(run(), loop)


async def gather_bounded(calls: Sequence[Callable[[], Awaitable[Any]]], concurrency: int) -> list[Any]:
    """Return the results of ``calls`` in their order, at most ``concurrency`` under way at once.

    The first exception cancels the rest and is raised.
    """
    slots = asyncio.Semaphore(concurrency)

    async def run(call: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await call()

    tasks = [asyncio.ensure_future(run(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the loop of a process. A forked process inherits no threads, so it needs its own loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="score functions", daemon=True).start()
    return loop
