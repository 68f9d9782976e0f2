"""Numbered claims of a lock, in a folder that may be shared, or in a bucket. Knows no torch, nor a claim's content.

In either place only one process can create a number, and a claim is read as it was last written. Every call may raise
``OSError``, and may be repeated after it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path, PurePosixPath

from align.store.object_store import Bucket
from align.store.retry import UNREACHABLE, drop_nfs_cache

CLAIM_BYTES = 1024
"""Size of every claim. It is rewritten in place, so on a full disk the holder can still show that it lives."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of a file system without hard links."""


class FolderClaims:
    """Claims as files named by their numbers. ``link`` creates a name for only one process, also on NFS."""

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
        """Create a claim; returns False if its number exists. Of several processes only one gets True."""
        target = self.folder / str(number)
        draft = self.folder / f".draft-{uuid.uuid4().hex}"
        try:
            # 1. Write the draft, so the claim is complete from its first moment.
            _write_new(draft, content)
            # 2. Link it to the number. The link fails if another process was first.
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


class BucketClaims:
    """Claims as objects of a bucket: a put that never replaces creates a number."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix

    def prepare(self) -> None:
        """Do nothing: a bucket has no folders."""

    def numbers(self) -> list[int]:
        """Return the numbers of the objects."""
        names = [PurePosixPath(path).name for path in self.bucket.sizes(self.prefix)]
        return [int(name) for name in names if name.isdecimal()]

    def read(self, number: int) -> bytes:
        """Return an object's bytes; empty if there is none."""
        return self.bucket.get(f"{self.prefix}/{number}") or b""

    def create(self, number: int, content: bytes) -> bool:
        """Put an object if there is none."""
        return self.bucket.put_new(f"{self.prefix}/{number}", content)

    def write(self, number: int, content: bytes) -> None:
        """Replace the object. Raises ``FileNotFoundError`` if it is gone."""
        # A put creates what is gone, so look first. A claim that comes back all the same does no harm: the process that
        # deleted it has a higher number, and the highest one counts.
        if not self.read(number):
            raise FileNotFoundError(self.describe(number))
        self.bucket.put(f"{self.prefix}/{number}", content)

    def delete(self, number: int) -> None:
        """Delete the object."""
        self.bucket.delete(f"{self.prefix}/{number}")

    def refresh(self) -> None:
        """Do nothing: object stores show every put to everybody at once."""

    def describe(self, number: int) -> str:
        """Return the object's address."""
        return f"{self.bucket.address}/{self.prefix}/{number}"


Claims = FolderClaims | BucketClaims
