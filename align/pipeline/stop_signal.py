"""Asking a run to stop at its next checkpoint: by ``kill -USR1``, or as a cluster does before it takes a machine back.

The runner hears the signal and leaves a file in the folder of the stage under way. The training loop looks for it after
every optimizer step (``align.training.stop_request``): a file, since that reaches every process of a stage, on other
nodes too. A stage without such a loop ends as it would have, and the run stops after it. Never imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

REQUEST = "stop.request"
"""The file in a stage's folder."""


class Stopped(Exception):
    """A run or stage stopped because it was asked to; it goes on where it was. The exit code is EX_TEMPFAIL."""

    exit_code = 75


class StopRequest:
    """Whether this process was asked to stop, and since when.

    ``patience`` is how many seconds a stage may take to stop by itself; None waits for its end. A second signal, too,
    ends the patience.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.patience = patience
        self.hears: frozenset[int] = frozenset()
        """Numbers of the signals that ask."""
        self._asked: float | None = None
        self._again = False

    def ask(self) -> None:
        """Ask, or ask again."""
        if self._asked is None:
            self._asked = time.monotonic()
        else:
            self._again = True

    @property
    def asked(self) -> bool:
        """Whether it was asked for."""
        return self._asked is not None

    @property
    def is_over(self) -> bool:
        """Whether a stage has had its time to stop by itself."""
        if self._asked is None:
            return False
        return self._again or (self.patience is not None and time.monotonic() - self._asked >= self.patience)

    @contextlib.contextmanager
    def hearing(self, *signals: int) -> Iterator[StopRequest]:
        """Hear these signals; in another thread than the main one, where Python allows no handler, none is heard."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, lambda *_: self.ask()) for number in signals}
        self.hears |= frozenset(signals)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # what came before there was a handler comes now
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.hears -= frozenset(signals)


def pass_on(folder: Path) -> None:
    """Ask the stage that works in ``folder``."""
    (folder / REQUEST).touch()


def clear(folder: Path) -> None:
    """Forget what an earlier attempt in ``folder`` was asked."""
    (folder / REQUEST).unlink(missing_ok=True)


def is_asked(folder: Path) -> bool:
    """Whether the stage that works in ``folder`` was asked."""
    return (folder / REQUEST).exists()


__all__ = ["REQUEST", "StopRequest", "Stopped", "clear", "is_asked", "pass_on"]


def die_with_parent(parent: int | None) -> None:
    """Have Linux end this process when the runner dies, so that no orphan works on under a released lock."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it died before the line above
        os._exit(1)
