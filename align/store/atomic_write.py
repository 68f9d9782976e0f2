"""Atomic writes: a file is complete or absent, also after a power cut. Knows no torch.

Every small file that another process or a later run reads back is written here: to a draft next to it, which is synced
and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_draft(path: Path) -> Iterator[Path]:
    """Yield a draft's path; after the context the draft is synced to disk and takes the place of ``path``.

    After an error the draft is deleted and the old content is still there. Each call has its own draft, so several
    processes may write the same file.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield draft
        # Content first, then the name: the name must never stand for a file without its content. The folder is not
        # synced, so after a power cut the old file may be back, which is whole, too.
        sync_file(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write bytes: after an error the old content is still there."""
    with atomic_draft(path) as draft:
        draft.write_bytes(data)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text as ``write_bytes_atomically`` does, without changing its line ends."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_atomically(path: Path, value: Any, default: Callable[[Any], Any] = str) -> None:
    """Write JSON as ``write_text_atomically`` does. ``default`` converts values that JSON has no form for."""
    write_text_atomically(path, json.dumps(value, indent=1, default=default))


def sync_file(file: Path) -> None:
    """Sync a file's content to disk."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync a folder's names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
