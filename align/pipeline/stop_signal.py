"""Ask a run to stop at its next checkpoint: by ``kill -USR1``, or as a cluster does before a preemption.

The runner receives the signal and leaves a file in the folder of the active stage. The training loop looks for the file
after every optimizer step (``align.training.stopping``). It is a file because a file reaches every process of a
stage, also on other nodes. A stage without such a loop ends as it would have, and the run stops after it. Never imports
torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

REQUEST = "stop.request"
"""The file in a stage's folder."""
CAN_STOP = "can_stop"
"""The event of a stage that looks for the file from now on."""


class Stopped(Exception):
    """A run or stage stopped on request; it continues from its checkpoint. The exit code is EX_TEMPFAIL."""

    exit_code = 75


class StopRequest:
    """The request to stop this process, and the time since it came.

    ``patience`` is the number of seconds that a stage has to stop by itself; None waits for its end. A second signal
    also ends the patience. With ``ctrl_c`` the first Ctrl-C is a request as well, and the second Ctrl-C interrupts.
    """

    def __init__(self, patience: float | None = None, *, ctrl_c: bool = False) -> None:
        self.patience = patience
        self.ctrl_c = ctrl_c
        self.is_interrupt = False
        """True if Ctrl-C made the request, so the run ends with ``KeyboardInterrupt``."""
        self.signals: frozenset[int] = frozenset()
        """Numbers of the signals that request a stop."""
        self._requested_at: float | None = None
        self._repeated = False

    def request(self) -> None:
        """Request a stop; a second request ends the patience."""
        if self._requested_at is None:
            # A signal handler calls this: it only records the request, and the runner's loop acts on it.
            self._requested_at = time.monotonic()
        else:
            self._repeated = True

    @property
    def is_requested(self) -> bool:
        """True once a stop was requested."""
        return self._requested_at is not None

    @property
    def is_over(self) -> bool:
        """True once a stage has had its time to stop by itself."""
        if self._requested_at is None:
            return False
        return self._repeated or (self.patience is not None and time.monotonic() - self._requested_at >= self.patience)

    def error(self, message: str) -> BaseException:
        """Return the exception that ends a run which stopped as requested."""
        return KeyboardInterrupt() if self.is_interrupt else Stopped(message)

    @contextlib.contextmanager
    def handle_ctrl_c(self, can_stop: Callable[[], bool]) -> Iterator[None]:
        """Turn the first Ctrl-C into a request while ``can_stop()``; any other Ctrl-C interrupts, as without this."""
        is_main = threading.current_thread() is threading.main_thread()
        # A shell has commands in the background ignore Ctrl-C, and a caller may handle it in another way.
        if not self.ctrl_c or not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def interrupt(number: int, frame: object) -> None:
            if self.is_requested or not can_stop():
                raise KeyboardInterrupt
            self.is_interrupt = True
            self.request()

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def handle_signals(self, *signals: int) -> Iterator[StopRequest]:
        """Handle these signals as requests. Outside the main thread Python allows no handler: none is handled there."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, lambda *_: self.request()) for number in signals}
        self.signals |= frozenset(signals)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # signals from before there was a handler arrive now
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.signals -= frozenset(signals)


def request_stop(folder: Path) -> None:
    """Ask the stage that works in ``folder`` to stop."""
    (folder / REQUEST).touch()


def clear_request(folder: Path) -> None:
    """Remove a request to an earlier attempt in ``folder``."""
    (folder / REQUEST).unlink(missing_ok=True)


def is_stop_requested(folder: Path) -> bool:
    """Return whether the stage that works in ``folder`` was asked to stop."""
    return (folder / REQUEST).exists()


def die_with_parent(parent: int | None) -> None:
    """Make Linux end this process when process ``parent`` dies, so no orphan works on under a released lock."""
    if not sys.platform.startswith("linux"):
        return
    # Linux treats the thread that started this process as its parent, so the end of that thread is enough.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it died before the line above
        os._exit(1)
