"""Retries for a shared file system: repeat calls while its server is away, and read past NFS's caches.

A network file system that loses its server gives errors that pass (`UNREACHABLE`), or keeps a call waiting, which needs
no retry. Leaves out locks (``locks.py``) and the layout of a store (``store.py``). Knows no torch.
"""

from __future__ import annotations

import contextlib
import errno
import time
import uuid
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from align.errors import StageFailed

P = ParamSpec("P")
T = TypeVar("T")

FILE_SYSTEM_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EREMOTEIO})
"""Errors that no socket gives: they come from a file system, whatever was called."""
UNREACHABLE = FILE_SYSTEM_ERRORS | frozenset(
    (
        *(errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN, errno.ENODEV, errno.ENXIO),
    )
)
"""Errors of a file system whose server, network or mount is away for a while."""
UNREACHABLE_STORE = "unreachable"
"""Status of a stage that failed because the store did not answer: once it does, the stage can continue."""
SECONDS = 300.0
"""Default time for retries: a file server restarts within minutes."""
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 10.0


class StoreUnreachable(StageFailed):
    """The store did not answer for as long as was waited; nothing in it was changed."""


class Retry:
    """Repeats calls that fail because a folder cannot be reached, for a bounded time."""

    def __init__(self, folder: Path | str, seconds: float = SECONDS, log: Callable[[str], None] | None = None) -> None:
        """``log`` is called once per call that has to wait."""
        self.folder = folder
        self.seconds = seconds
        self.log = log or (lambda _: None)

    def call(self, action: Callable[[], T]) -> T:
        """Return what ``action`` returns; it must do no harm when it is done twice.

        Raises ``StoreUnreachable`` after ``seconds`` without an answer, and any other error at once.
        """
        deadline = time.monotonic() + self.seconds
        pause = FIRST_PAUSE
        has_logged = False
        while True:
            try:
                return action()
            except OSError as error:
                # Errors like a missing file do not pass: waiting would only hide them.
                if error.errno not in UNREACHABLE:
                    raise
                reason = error.strerror or error
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise StoreUnreachable(
                        f"{self.folder}: the store could not be reached for {self.seconds:.0f} s ({reason}). Finished "
                        "stages and checkpoints are kept; run again when it is back, or raise runtime.store.patience."
                    ) from None
                if not has_logged:
                    has_logged = True
                    self.log(
                        f"{self.folder}: the store does not answer ({reason}); trying for up to {self.seconds:.0f} s"
                    )
                time.sleep(min(pause, remaining))
                pause = min(2 * pause, LONGEST_PAUSE)


class _HasRetry(Protocol):
    retry: Retry


S = TypeVar("S", bound=_HasRetry)


def with_retry(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Repeat a method with its object's ``retry``; it must do no harm when it is done twice."""

    @wraps(method)
    def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.retry.call(lambda: method(self, *args, **kwargs))

    return wrapper


def drop_nfs_cache(folder: Path) -> None:
    """Have the file system read ``folder`` from its server again.

    NFS remembers for up to a minute which names a folder lacks, and so misses what another machine has just created. A
    change by this machine makes it ask the server.
    """
    probe = folder / f".look-{uuid.uuid4().hex}"
    try:
        probe.touch()
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()


def is_unreachable(error: BaseException) -> bool:
    """Return True when an error, also one wrapped by a library, says that a file system is away, not just any peer."""
    if isinstance(error, OSError) and error.errno is not None:
        # Sockets also give the other errors. Only a call that took a path has a file name in its error.
        return error.errno in FILE_SYSTEM_ERRORS or (error.errno in UNREACHABLE and error.filename is not None)
    text = str(error)  # safetensors and tokenizers wrap the system's error in their own errors
    return any(f"(os error {number})" in text for number in FILE_SYSTEM_ERRORS)
