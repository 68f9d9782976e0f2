"""Ways in which a disk, a user or a kill damages a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def flip_bit(file: Path) -> None:
    """Change one bit in the middle; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def truncate(file: Path) -> None:
    """Leave the first half."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def empty(file: Path) -> None:
    """Leave nothing in it."""
    file.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped-bit": flip_bit,
    "truncated": truncate,
    "empty": empty,
    "deleted": Path.unlink,
}
