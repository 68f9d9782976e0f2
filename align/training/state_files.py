"""Small files with what a stage must remember beside its checkpoints: there whole or not at all, and sealed.

A file carries the SHA-256 of its content, so that one whose bytes changed is never believed. Reading one that is
missing or damaged gives None: its content is then computed again. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from align.whole_files import write_atomically


def write_state(file: Path, content: dict[str, Any]) -> None:
    """Write ``content``, which JSON must be able to hold, and bring it to the disk."""
    write_atomically(file, {"content": content, "sha256": _digest(content)})


def read_state(file: Path) -> dict[str, Any] | None:
    """The content of ``file``; None where there is none. A damaged file counts as none, and a line is printed."""
    try:
        return _unseal(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print(f"{file} is damaged ({error}); its content is computed again")
        return None


def _unseal(text: str) -> dict[str, Any]:
    try:
        sealed = json.loads(text)
        content: dict[str, Any] = sealed["content"]
        digest = sealed["sha256"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(content, dict) or digest != _digest(content):
        raise ValueError("its SHA-256 differs")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
