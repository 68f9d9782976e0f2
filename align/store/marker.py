"""The file ``align-store.json``, which marks a folder as a store. Knows no torch."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from align.errors import UserError
from align.store.atomic_write import write_atomically
from align.store.json_files import DamagedFile, parse_object, validate
from align.store.retry import UNREACHABLE

MARKER = "align-store.json"
FORMAT = 1


class _Marker(BaseModel):
    """Content of ``align-store.json``."""

    model_config = ConfigDict(strict=True)

    format: int


def open_folder(root: Path) -> None:
    """Make ``root`` a store unless it is one.

    Raises ``UserError`` where it cannot be used or is something else, ``OSError`` where it is away.
    """
    marker = root / MARKER
    try:
        if marker.is_file():
            content = validate(_Marker, parse_object(marker.read_bytes()))
            if content.format != FORMAT:
                raise UserError(
                    f"{root}: a store of format {content.format} by its {MARKER}, this align reads format {FORMAT}. "
                    "Use the align that made it, or another --store."
                )
        # Never turn somebody's folder of other files into a store.
        elif root.exists() and not _may_become_a_store(root):
            raise UserError(
                f"{root}: not empty and not an align store (no {MARKER}); name an empty or new folder with --store."
            )
        else:
            root.mkdir(parents=True, exist_ok=True)
            write_atomically(marker, {"format": FORMAT})
        # Reading is enough for most commands; ``Store.require_writable`` is for the others.
        if not os.access(root, os.R_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
    except DamagedFile as error:
        raise UserError(
            f"{marker}: damaged: it {error}. Write {json.dumps({'format': FORMAT})} into it if {root} is a store, or "
            "name another --store."
        ) from None
    except OSError as error:
        # The caller retries these.
        if error.errno in UNREACHABLE:
            raise
        raise UserError(
            f"{root}: the store cannot be used ({error.strerror or error}); "
            "name another folder with --store or $ALIGN_STORE."
        ) from None


def require_marker(root: Path) -> None:
    """Raise ``OSError`` where a store's marker is gone: a mount that is away leaves an empty folder behind."""
    if not (root / MARKER).is_file():
        raise OSError(errno.ENOTCONN, f"its mark {MARKER} is gone, as where a file system is not mounted")


def _may_become_a_store(root: Path) -> bool:
    """Return True for an empty folder, and for one that another run is making a store at this moment."""
    return root.is_dir() and all(path.name.startswith(f".{MARKER}.") or path.name == MARKER for path in root.iterdir())
