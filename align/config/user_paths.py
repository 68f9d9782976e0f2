"""Paths that a user wrote or sets by a variable, checked. Never imports torch."""

from __future__ import annotations

import errno
import glob
import os
from pathlib import Path

from align.errors import UserError, shorten

REFUSED = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""Errors of paths that cannot exist. A missing file is no error here: its reader reports it."""


def cache_folder() -> Path:
    """Return the folder for downloads and small caches, outside the repository and the store."""
    return Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align").expanduser()


def user_path(text: str, base: Path | None = None) -> Path:
    """Return the path that ``text`` names, ``~`` and ``~user`` replaced; a relative one starts at ``base``.

    Raises ``UserError`` for text that no file system accepts, and for a user that this machine does not know.
    """
    try:
        path = Path(text).expanduser()
        path = path if base is None else base / path
        # Looked at only for errors that no later reader could explain better.
        os.fsencode(path).decode("utf-8")
        os.lstat(path)
    except RuntimeError:
        user = shorten(text.partition("/")[0])
        raise UserError(f"'{shorten(text)}': there is no user '{user[1:]}' here; write the folder itself.") from None
    except ValueError as error:
        raise UserError(f"'{shorten(text)}' is no path: {_encoding_problem(error)}.") from None
    except OSError as error:
        if error.errno in REFUSED:
            raise UserError(f"'{shorten(text)}' is no path: {error.strerror}.") from None
    return path


def matching_paths(pattern: str, base: Path) -> list[Path]:
    """Return the files and folders that a path or glob names, sorted; a relative one starts at ``base``.

    A bracket in ``base``, or in a path that exists as it is written, is a sign like others.
    """
    path = user_path(pattern, base)
    if path.exists():
        return [path]
    names = glob.glob(str(Path(pattern).expanduser()), root_dir=base, recursive=True)
    return sorted(base / name for name in names)


def _encoding_problem(error: ValueError) -> str:
    """Describe a path that is not text; both ``UnicodeError`` and the error for a NUL character are ``ValueError``."""
    if isinstance(error, UnicodeError):
        return "it has bytes or half characters that are no UTF-8 text"
    return str(error)
