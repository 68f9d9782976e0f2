"""Where a lock's numbered claims lie: in a folder, perhaps a shared one. Knows no torch, and nothing of what they say.

``remote.py`` has the same for a bucket of an object store. Whatever the place, a number is given once, to one asker,
and a claim is read as it was last written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import Protocol

from align.store.retry import UNREACHABLE, forget_cached

CLAIM_BYTES = 1024
"""Claims are written over in place, always whole: on a full disk the holder can still say that it lives."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Claims(Protocol):
    """The claims of one lock. Every call may raise ``OSError``, and may be made again after it."""

    def prepare(self) -> None:
        """Make the place where there is none."""

    def numbers(self) -> list[int]:
        """Numbers of the claims there are."""

    def read(self, number: int) -> bytes:
        """What a claim says; empty where there is none."""

    def make(self, number: int, content: bytes) -> bool:
        """Make a claim unless its number has been given."""

    def write(self, number: int, content: bytes) -> None:
        """Write over one's own claim; ``FileNotFoundError`` where it is gone."""

    def drop(self, number: int) -> None:
        """Delete a claim, if it is there."""

    def look_anew(self) -> None:
        """Have the next look see what is really there."""

    def describe(self, number: int) -> str:
        """Where a claim lies, for people."""


class FolderClaims:
    """Files named by their numbers; ``link`` is what gives a name to one asker alone, on NFS too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> list[int]:
        """Numbers of the files there are; drafts and probes have other names."""
        return [int(name) for name in os.listdir(self.folder) if name.isdecimal()]

    def read(self, number: int) -> bytes:
        """A claim's bytes: opening a file has NFS ask for its newest state. Empty for one just tidied away."""
        try:
            with (self.folder / str(number)).open("rb") as file:
                return file.read(CLAIM_BYTES)
        except FileNotFoundError:
            return b""

    def make(self, number: int, content: bytes) -> bool:
        """Complete from its first moment where links exist."""
        target, draft = self.folder / str(number), self.folder / f".draft-{uuid.uuid4().hex}"
        try:
            _write_new(draft, content)
            try:
                os.link(draft, target)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno in NO_LINKS:
                    return _make_alone(target, content)
                if error.errno not in UNREACHABLE:
                    raise
            # The answer to a link may be lost on its way although the link was made: the count of names tells.
            return os.stat(draft).st_nlink == 2
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()

    def write(self, number: int, content: bytes) -> None:
        """In place: nothing has to be allocated, and nothing that another made can be hit."""
        handle = os.open(self.folder / str(number), os.O_WRONLY)
        try:
            os.pwrite(handle, content, 0)
            os.fsync(handle)
        finally:
            os.close(handle)

    def drop(self, number: int) -> None:
        """Delete the file."""
        (self.folder / str(number)).unlink(missing_ok=True)

    def look_anew(self) -> None:
        """Past the caches of NFS."""
        with contextlib.suppress(FileNotFoundError):
            forget_cached(self.folder)

    def describe(self, number: int) -> str:
        """The file's path."""
        return str(self.folder / str(number))


def _make_alone(target: Path, content: bytes) -> bool:
    """For a file system without links: empty at first, which its readers bear."""
    try:
        _write_new(target, content)
    except FileExistsError:
        return False
    return True


def _write_new(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
