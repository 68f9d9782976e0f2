"""The errors a user sees, and the exit code of each.

Everything else that escapes is a bug in align and keeps its traceback.
"""

import errno
import shutil
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
LITTLE_SPACE = 64 * 1024
"""Bytes; a disk with less cannot even take a stage's result."""


class UserError(Exception):
    """The user's input is wrong: exit code 2, one message with the place and the remedy, no traceback."""

    exit_code = 2


class StageFailed(Exception):
    """A stage ended without its artifact: exit code 1, the message names the stage and the path of its log."""

    exit_code = 1


def explain_os_error(error: OSError, folder: Path) -> str:
    """One sentence on an error of the system while working in ``folder``; a full disk comes with its remedy."""
    return no_space(folder) if error.errno in NO_SPACE else f"{type(error).__name__}: {error}"


def no_space(folder: Path) -> str:
    """What to do about the full disk that holds ``folder``."""
    return (
        f"no space left on the disk that holds {folder}; free some (`align gc` lists what no run needs) "
        "or name another --store, then run again: finished stages are kept."
    )


def disk_is_full(folder: Path) -> bool:
    """Whether next to nothing can be written any more where ``folder`` lies."""
    return shutil.disk_usage(folder).free < LITTLE_SPACE
