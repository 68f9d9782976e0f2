"""Files that are there whole or not at all, also after a power cut. Knows no torch.

Every small file that another process, or a later run, reads back is written here: to a draft beside it, synced,
renamed.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text that is there whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, value: Any, default: Callable[[Any], Any] = str) -> None:
    """Write JSON that is there whole or not at all. ``default`` converts what JSON has no form for."""
    write_text_atomically(path, json.dumps(value, indent=1, default=default))


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
