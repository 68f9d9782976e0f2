"""What a folder on a shared file system asks for: patience while it does not answer, and looks that skip its caches.

A network file system that loses its server gives errors that pass (`UNREACHABLE`), or keeps a call waiting, which needs
nothing here. Left out: locks (``locking.py``), and what is kept where (``store.py``). Knows no torch.
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

UNREACHABLE = frozenset({
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO, errno.ESHUTDOWN,
    errno.ENODEV, errno.ENXIO,
})  # fmt: skip
"""Errors of a file system whose server, network or mount is away for a while."""
OF_FILES = frozenset({errno.EIO, errno.ESTALE, errno.EREMOTEIO})
"""Those that no socket gives: they are a file system's whatever was being done."""
UNREACHABLE_STORE = "unreachable"
"""Status of a stage that failed because the store did not answer: once it does, the stage can go on."""
SECONDS = 300.0
"""How long such errors are borne by default: a file server restarts within minutes."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0


class StoreUnreachable(StageFailed):
    """The store did not answer for as long as was waited; nothing of it was changed."""


class Patience:
    """Repeats what fails because a folder cannot be reached, for a bounded time."""

    def __init__(self, folder: Path | str, seconds: float = SECONDS, say: Callable[[str], None] | None = None) -> None:
        self.folder, self.seconds, self.say = folder, seconds, say or (lambda _: None)

    def keep_trying(self, action: Callable[[], T]) -> T:
        """What ``action`` returns, which must do no harm when it is done twice.

        Raises ``StoreUnreachable`` after ``seconds`` without an answer, and any other error at once.
        """
        began, pause, told = time.monotonic(), FIRST_PAUSE, False
        while True:
            try:
                return action()
            except OSError as error:
                if error.errno not in UNREACHABLE:
                    raise
                left = began + self.seconds - time.monotonic()
                if left <= 0:
                    raise StoreUnreachable(
                        f"{self.folder}: the store could not be reached for {self.seconds:.0f} s "
                        f"({error.strerror or error}). Finished stages and checkpoints are kept; run again when "
                        "it is back, or raise runtime.store.patience."
                    ) from None
                if not told:
                    told = True
                    self.say(
                        f"{self.folder}: the store does not answer ({error.strerror or error}); "
                        f"trying for up to {self.seconds:.0f} s"
                    )
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)


class _Patient(Protocol):
    patience: Patience


S = TypeVar("S", bound=_Patient)


def patient(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method that is repeated with its object's ``patience``; it must do no harm when it is done twice."""

    @wraps(method)
    def repeated(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.patience.keep_trying(lambda: method(self, *args, **kwargs))

    return repeated


def forget_cached(folder: Path) -> None:
    """Have the file system look at ``folder`` anew.

    NFS remembers for up to a minute which names a folder lacks, and so misses what another machine has just put there.
    A change of one's own makes it ask the server again.
    """
    probe = folder / f".look-{uuid.uuid4().hex}"
    try:
        probe.touch()
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()


def is_unreachable(error: BaseException) -> bool:
    """Whether this error, or one that a library made of it, says that a file system is away and not just any peer."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in OF_FILES or (error.errno in UNREACHABLE and error.filename is not None)
    text = str(error)  # safetensors and tokenizers wrap the system's error in one of their own
    return any(f"(os error {number})" in text for number in OF_FILES)


__all__ = [
    "UNREACHABLE",
    "UNREACHABLE_STORE",
    "Patience",
    "StoreUnreachable",
    "forget_cached",
    "is_unreachable",
    "patient",
]
