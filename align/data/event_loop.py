"""One asyncio loop per process, in a separate thread, for the async functions of users. Torch-free.

The loop outlives a call, so a client which a function opens once, with its connections, serves every batch.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

_starting = threading.Lock()
"""Held by who looks for the loop: threads that begin at the same time would start one each."""


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, which runs in the process's loop; its exception is raised here."""
    return start(awaitable).result()


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
