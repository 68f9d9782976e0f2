"""Small files with what a stage must remember beside its checkpoints: there whole or not at all, and sealed.

Reading one that is missing or damaged gives None: its content is then computed again. Torch-free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.store.json_files import DamagedFile, parse_sealed, read_file, write_sealed


def write_state(file: Path, content: dict[str, Any]) -> None:
    """Write ``content``, which JSON must be able to hold, and bring it to the disk."""
    write_sealed(file, content)


def read_state(file: Path) -> dict[str, Any] | None:
    """Return the content of ``file``, or None where there is none. A damaged file counts as none, with a line."""
    try:
        return parse_sealed(read_file(file))
    except FileNotFoundError:
        return None
    except (OSError, DamagedFile) as error:
        print(f"{file} {error}; its content is computed again")
        return None
