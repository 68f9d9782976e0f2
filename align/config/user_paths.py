"""Paths that a user wrote, looked at before anything else touches them. Never imports torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from align.errors import UserError, shorten

REFUSED = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""What the system says of a path that cannot be one; that nothing is there is said by whoever looks for it."""


def user_path(text: str, base: Path | None = None) -> Path:
    """Return the path that ``text`` names, ``~`` and ``~user`` replaced; a relative one starts at ``base``.

    Raises ``UserError`` for text that no file system takes, and for a user that this machine does not know.
    """
    try:
        path = Path(text).expanduser()
        path = path if base is None else base / path
        os.fsencode(path).decode("utf-8")
        os.lstat(path)
    except RuntimeError:
        user = shorten(text.partition("/")[0])
        raise UserError(f"'{shorten(text)}': there is no user '{user[1:]}' here; write the folder itself.") from None
    except ValueError as error:
        raise UserError(f"'{shorten(text)}' is no path: {_why_no_text(error)}.") from None
    except OSError as error:
        if error.errno in REFUSED:
            raise UserError(f"'{shorten(text)}' is no path: {error.strerror}.") from None
    return path


def _why_no_text(error: ValueError) -> str:
    """``UnicodeError`` is a ``ValueError``, as is the one for a NUL character."""
    if isinstance(error, UnicodeError):
        return "it has bytes or half characters that are no UTF-8 text"
    return str(error)
