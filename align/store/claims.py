"""Numbered claims of a lock as files in a folder, perhaps a shared one. Knows no torch, nor a claim's content.

``object_store.py`` has the same for a bucket. In either place only one process can create a number, and a claim is read
as it was last written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import Protocol

from align.store.retry import UNREACHABLE, drop_nfs_cache

CLAIM_BYTES = 1024
"""Size of every claim. It is rewritten in place, so on a full disk the holder can still show that it lives."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of a file system without hard links."""


class Claims(Protocol):
    """The claims of one lock. Every call may raise ``OSError``, and may be repeated after it."""

    def prepare(self) -> None:
        """Create the place if there is none."""

    def numbers(self) -> list[int]:
        """Return the numbers of the existing claims."""

    def read(self, number: int) -> bytes:
        """Return a claim's content; empty if there is none."""

    def create(self, number: int, content: bytes) -> bool:
        """Create a claim; returns False when its number exists. Of several processes only one gets True."""

    def write(self, number: int, content: bytes) -> None:
        """Rewrite this process's claim. Raises ``FileNotFoundError`` if it is gone."""

    def delete(self, number: int) -> None:
        """Delete a claim if it exists."""

    def refresh(self) -> None:
        """Drop caches, so the next call sees what is really there."""

    def describe(self, number: int) -> str:
        """Return a claim's address, for messages."""


class FolderClaims:
    """Claims as files named by their numbers. ``link`` creates a name for only one process, on NFS too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Create the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> list[int]:
        """Return the numbers of the files; drafts and probes have other names."""
        return [int(name) for name in os.listdir(self.folder) if name.isdecimal()]

    def read(self, number: int) -> bytes:
        """Return a claim's bytes; opening the file makes NFS ask for its newest state. Empty for one just deleted."""
        try:
            with (self.folder / str(number)).open("rb") as file:
                return file.read(CLAIM_BYTES)
        except FileNotFoundError:
            return b""

    def create(self, number: int, content: bytes) -> bool:
        """Create a claim from a complete draft by a hard link, or without links as an empty file first."""
        target, draft = self.folder / str(number), self.folder / f".draft-{uuid.uuid4().hex}"
        try:
            # 1. Write the draft, so the claim is complete from its first moment.
            _write_new(draft, content)
            # 2. Link it to the number. The link fails where another process was first.
            try:
                os.link(draft, target)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno in NO_LINKS:
                    return _create_without_link(target, content)
                if error.errno not in UNREACHABLE:
                    raise
            # 3. The answer to a link may be lost although the link was made: the draft's count of names tells.
            return os.stat(draft).st_nlink == 2
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()

    def write(self, number: int, content: bytes) -> None:
        """Rewrite the file in place: no space is allocated, and no other process's file can be hit."""
        handle = os.open(self.folder / str(number), os.O_WRONLY)
        try:
            # A waiter on another machine sees the beat only once the server has it.
            os.pwrite(handle, content, 0)
            os.fsync(handle)
        finally:
            os.close(handle)

    def delete(self, number: int) -> None:
        """Delete the file."""
        (self.folder / str(number)).unlink(missing_ok=True)

    def refresh(self) -> None:
        """Drop the caches of NFS."""
        with contextlib.suppress(FileNotFoundError):
            drop_nfs_cache(self.folder)

    def describe(self, number: int) -> str:
        """Return the file's path."""
        return str(self.folder / str(number))


def _create_without_link(target: Path, content: bytes) -> bool:
    """Create a claim on a file system without links. It is empty at first, which its readers count as held."""
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
