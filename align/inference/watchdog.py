"""Bounds the calls to an engine in this process: a call in native code that hangs cannot be interrupted from Python.

A thread beside each call counts the seconds in which it made no progress. When they come to ``runtime.engine.timeout``
it says what was waited for, dumps the stacks of all threads, and hands over to ``on_hang``. A stage ends its process
there, as failed, and is resumed from its last checkpoint (``StageContext.fail_at_once``). In a process that is not
ours, a notebook or a script, there is no ``on_hang``: the message and the stacks are all, and whoever reads them
decides. Servers need none of it: their client bounds every call (``server_client.py``).

Left out: calls that nest, or that two threads make at once. A process that was stopped from outside has not waited for
its engine, unless it stood still for twice the timeout within one call: then Python's own timer ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator

from align.config.runtime import EngineConfig

OnHang = Callable[[str], None]
"""Told what was waited for; need not return."""

TICKS = 20
"""Looks at the call per timeout."""
MOST_SECONDS = 5.0
"""Between two looks at most."""


class Watchdog:
    """Watches one engine's calls, one at a time."""

    def __init__(self, engine: str, timeout: float | None = None, on_hang: OnHang | None = None) -> None:
        """``timeout`` is seconds without progress, by default that of ``EngineConfig``."""
        self.engine, self.on_hang = engine, on_hang
        self.timeout: float = EngineConfig().timeout if timeout is None else timeout
        self._progress = 0

    def progress(self) -> None:
        """The call goes on: another token of each sequence, another tensor. The clock starts anew."""
        self._progress += 1

    @contextlib.contextmanager
    def watch(self, call: str) -> Iterator[None]:
        """Watch what happens inside, which ``call`` names."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._wait, args=(call, ended), name="engine-watchdog", daemon=True)
        self._arm_backstop()
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            if self.on_hang is not None:
                faulthandler.cancel_dump_traceback_later()

    def _wait(self, call: str, ended: threading.Event) -> None:
        seconds, seen, tick = 0.0, self._progress, min(self.timeout / TICKS, MOST_SECONDS)
        while seconds < self.timeout:
            began = time.monotonic()
            if ended.wait(tick):
                return
            # A process that was stopped, or starved, for an hour has not waited for its engine that long.
            seconds += min(time.monotonic() - began, 2 * tick)
            if self._progress != seen:
                seconds, seen = 0.0, self._progress
            self._arm_backstop()
        self._give_up(call, seconds)

    def _arm_backstop(self) -> None:
        """A call that hangs while it holds the interpreter's lock keeps this thread from running at all. Python's own
        timer needs no lock: it dumps the stacks and ends the process with exit code 1, without a message of ours. There
        is one such timer a process, so it is only set in a process that may be ended.
        """
        if self.on_hang is not None:
            faulthandler.dump_traceback_later(2 * self.timeout, exit=True, file=_stream())

    def _give_up(self, call: str, seconds: float) -> None:
        what = f"the {self.engine} engine made no progress in '{call}' for {seconds:.0f} s (runtime.engine.timeout)"
        remedy = (
            "If it was only slow, raise runtime.engine.timeout or lower runtime.engine.batch_size; if it hangs there "
            "again, set runtime.engine.name to another engine. The stacks of all threads stand below."
        )
        ends = "Nothing was ended" if self.on_hang is None else "Its process ends; run again to resume the stage"
        message = f"{what}. {ends}: a call that hangs in native code cannot be interrupted. {remedy}"
        stream = _stream()
        print(message, file=stream, flush=True)
        with contextlib.suppress(OSError, RuntimeError):  # the message matters more
            faulthandler.dump_traceback(file=stream, all_threads=True)
        if self.on_hang is not None:
            self.on_hang(message.replace("stand below", "are in the log"))


def _stream() -> io.TextIOBase:
    """Standard error, or where it has no file behind it (a notebook's has none) the process's own."""
    try:
        sys.stderr.fileno()
        return sys.stderr  # type: ignore[return-value]
    except (AttributeError, OSError, ValueError):
        return sys.__stderr__  # type: ignore[return-value]
