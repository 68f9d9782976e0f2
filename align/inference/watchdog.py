"""Timeout for calls to an engine in this process, where a call in native code cannot be interrupted from Python.

A thread beside each call counts the seconds without progress. When they reach ``runtime.engine.timeout`` it writes a
message and the stacks of all threads to standard error, and calls ``on_hang``. A stage ends its process there, as
failed, and is resumed from its last checkpoint (``StageContext.fail_at_once``). In a notebook or a script there is no
``on_hang``: the user reads the message and decides. Servers need no watchdog: their client bounds every call
(``server_client.py``).

Leaves out nested calls, and calls by two threads at once. Time in which the whole process was stopped does not count,
unless it exceeds twice the timeout within one call: then Python's own timer ends the process.
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
"""Called with the message; need not return."""

TICKS = 20
"""Looks at the call per timeout."""
MAX_TICK_SECONDS = 5.0
"""Seconds between two looks, at most."""


class Watchdog:
    """Watches one engine's calls, one at a time."""

    def __init__(self, engine: str, timeout: float | None = None, on_hang: OnHang | None = None) -> None:
        """``timeout`` is seconds without progress, by default that of ``EngineConfig``."""
        self.engine, self.on_hang = engine, on_hang
        self.timeout: float = EngineConfig().timeout if timeout is None else timeout
        self._progress = 0

    def progress(self) -> None:
        """Restart the clock: the call has made another token of each sequence, or loaded another tensor."""
        self._progress += 1

    @contextlib.contextmanager
    def watch(self, call: str) -> Iterator[None]:
        """Watch the code inside; ``call`` names it in messages."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._wait, args=(call, ended), name="engine-watchdog", daemon=True)
        self._arm_backstop()
        watcher.start()
        try:
            yield
        finally:
            # The watcher is joined, so that none reports a hang after the call has ended.
            ended.set()
            watcher.join()
            if self.on_hang is not None:
                faulthandler.cancel_dump_traceback_later()

    def _wait(self, call: str, ended: threading.Event) -> None:
        tick = min(self.timeout / TICKS, MAX_TICK_SECONDS)
        seconds, last_progress = 0.0, self._progress
        while seconds < self.timeout:
            began = time.monotonic()
            if ended.wait(tick):
                return
            # A process that was stopped, or starved, for an hour has not waited for its engine that long.
            seconds += min(time.monotonic() - began, 2 * tick)
            # Any progress since the last look restarts the count.
            if self._progress != last_progress:
                seconds, last_progress = 0.0, self._progress
            self._arm_backstop()
        self._report_hang(call, seconds)

    def _arm_backstop(self) -> None:
        """Set Python's own timer, for a call that hangs while it holds the interpreter's lock.

        Such a call keeps the watching thread from running at all. The timer needs no lock: it dumps the stacks and ends
        the process with exit code 1, without our message. There is one such timer per process, so it is only set in a
        process that may be ended.
        """
        if self.on_hang is not None:
            faulthandler.dump_traceback_later(2 * self.timeout, exit=True, file=_stream())

    def _report_hang(self, call: str, seconds: float) -> None:
        problem = f"the {self.engine} engine made no progress in '{call}' for {seconds:.0f} s (runtime.engine.timeout)"
        remedy = (
            "If it was only slow, raise runtime.engine.timeout or lower runtime.engine.batch_size; if it hangs there "
            "again, set runtime.engine.name to another engine. The stacks of all threads stand below."
        )
        outcome = "Nothing was ended" if self.on_hang is None else "Its process ends; run again to resume the stage"
        message = f"{problem}. {outcome}: a call that hangs in native code cannot be interrupted. {remedy}"
        stream = _stream()
        stream.write(f"{message}\n")
        stream.flush()
        with contextlib.suppress(OSError, RuntimeError):  # the message matters more
            faulthandler.dump_traceback(file=stream, all_threads=True)
        if self.on_hang is not None:
            self.on_hang(message.replace("stand below", "are in the log"))


def _stream() -> io.TextIOBase:
    """Return standard error, or the process's original one where it has no file behind it, as in a notebook."""
    try:
        sys.stderr.fileno()
        return sys.stderr  # type: ignore[return-value]
    except (AttributeError, OSError, ValueError):
        return sys.__stderr__  # type: ignore[return-value]
