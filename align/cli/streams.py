"""Standard output and error that may fail: a reader closes them (``align run ... | head -1``), or a disk is full.

A command that does work, like ``run``, continues without them. A command that only prints ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class OutputEnded(BaseException):
    """Raised when output fails in a command that only prints. A ``BaseException``, so no handler swallows it."""


class GuardedStream:
    """A text stream that drops all further output once a write has failed.

    ``error`` is the first failure. It raises ``OutputEnded`` unless the command ``goes_on``.
    """

    def __init__(self, stream: TextIO, goes_on: bool) -> None:
        self.stream = stream
        self.goes_on = goes_on
        self.error: OSError | None = None
        self.is_document = False
        """The output is one JSON document, of which a part is useless."""

    def write(self, text: str) -> int:
        """Write ``text``, or drop it after a failure."""
        # After the first failure text is dropped, but counted as written: the caller continues.
        if self.error is None:
            try:
                return self.stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush, unless the stream has failed."""
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._fail(error)

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def _fail(self, error: OSError) -> None:
        self.error = error
        # Python flushes its buffer once more when it exits. Point the descriptor at /dev/null, so this flush succeeds.
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
    """Guard standard output, which is yielded, and standard error, which never ends the command."""
    before = sys.stdout, sys.stderr
    output = GuardedStream(before[0] or _open_devnull(1), goes_on=False)
    sys.stdout = cast(TextIO, output)
    sys.stderr = cast(TextIO, GuardedStream(before[1] or _open_devnull(2), goes_on=True))
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = before


def _open_devnull(number: int) -> TextIO:
    """Return a stream for a descriptor that was closed before the command began.

    It gets the same ``number``; otherwise the next file to be opened would get it and receive the output.
    """
    handle = os.open(os.devnull, os.O_WRONLY)
    if handle != number:
        os.dup2(handle, number)
        os.close(handle)
    return os.fdopen(number, "w", closefd=False)
