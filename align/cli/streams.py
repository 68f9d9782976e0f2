"""Standard output and error of a command, which a reader may close (``align run ... | head -1``) and a disk may fill.

A command that works on, like a run, goes on without them; one that only prints has nothing left to do and ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class OutputEnded(BaseException):
    """Nobody reads what the command prints, and printing is all that it does. No ``except Exception`` takes it."""


class GuardedStream:
    """A text stream that drops what is written to it once that has failed.

    ``error`` is why; unless the command ``goes_on`` the failure raises ``OutputEnded``.
    """

    def __init__(self, stream: TextIO, goes_on: bool) -> None:
        self.stream, self.goes_on = stream, goes_on
        self.error: OSError | None = None
        self.is_document = False
        """Whether one JSON document is printed, of which a part is of no use."""

    def write(self, text: str) -> int:
        """Write, or drop."""
        if self.error is None:
            try:
                return self.stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush what is not dropped."""
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._fail(error)

    def writelines(self, lines: Any) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def _fail(self, error: OSError) -> None:
        self.error = error
        # Python writes what is buffered once more at its end: that must not fail again.
        with contextlib.suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.stream.fileno())
            os.close(devnull)
        if not self.goes_on:
            raise OutputEnded from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def guarded_streams() -> Iterator[GuardedStream]:
    """Guard standard output, which is given, and standard error, which always goes on."""
    before = sys.stdout, sys.stderr
    output = GuardedStream(before[0] or _nowhere(1), goes_on=False)
    sys.stdout = cast(TextIO, output)
    sys.stderr = cast(TextIO, GuardedStream(before[1] or _nowhere(2), goes_on=True))
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = before


def _nowhere(number: int) -> TextIO:
    """A stream for one that was closed before the command began, under its number: no other file may get that."""
    handle = os.open(os.devnull, os.O_WRONLY)
    if handle != number:
        os.dup2(handle, number)
        os.close(handle)
    return os.fdopen(number, "w", closefd=False)
