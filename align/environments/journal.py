"""What happened in the episodes of one update, on disk before it is used, so that a killed update goes on from it.

A file of sealed JSON lines, which is only ever appended to. Entries that were written together share a line: after a
kill all of them are there, or none. A line is synced before its entries can be read back. What follows the first line
that is torn or damaged is dropped: entries build on those before them. Torch-free. Leaves out what the entries mean
(``replay.py``).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from align.store.atomic_write import sync_folder
from align.store.sealed import open_sealed, seal

HEADER = "journal"
"""Kind of the first line, which holds the journal's key."""


@dataclass(frozen=True)
class Position:
    """Place of an entry in an update."""

    kind: str
    """``reset``, ``turn``, ``call``, ``step`` or ``score``; or another word of the caller's."""
    episode: int
    turn: int = 0
    index: int = 0
    """Number among several of a kind in a turn."""


class Journal:
    """Entries by their position, each written once. Any thread may read and write."""

    def __init__(self, path: Path, key: str = "") -> None:
        """Open or create the journal at ``path``.

        ``key`` is anything that tells this update from others that might have left a file there; the entries of a
        journal with another key are dropped.
        """
        self.path = path
        self.key = key
        self._entries: dict[Position, dict[str, Any]] = {}
        self._write_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._written = self._synced = 0
        """Lines that were written by this object, and how many of them are on the disk for certain."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._end = self._read()
        """Length of the lines that count, in bytes."""
        # The file is new or has another key. What it holds is overwritten from the start.
        if not self._end:
            self._append({"kind": HEADER, "key": key})
            sync_folder(path.parent)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: str, episode: int, turn: int = 0, index: int = 0) -> dict[str, Any] | None:
        """Return an entry, or None."""
        return self.find(Position(kind, episode, turn, index))

    def find(self, position: Position) -> dict[str, Any] | None:
        """Return the entry at a position, or None."""
        return self._entries.get(position)

    def entries(self, episode: int) -> list[tuple[Position, dict[str, Any]]]:
        """Return the entries of an episode in the order in which they were written."""
        return [(position, entry) for position, entry in list(self._entries.items()) if position.episode == episode]

    def put(self, kind: str, episode: int, turn: int = 0, index: int = 0, *, entry: Mapping[str, Any]) -> None:
        """Write an entry, and return when it is on the disk."""
        self.put_all([(Position(kind, episode, turn, index), entry)])

    def put_all(self, entries: Iterable[tuple[Position, Mapping[str, Any]]]) -> None:
        """Write entries together, and return when they are on the disk.

        Raises ``ValueError`` for a position that has an entry, and ``OSError`` where the disk takes none.
        """
        lines = []
        for position, entry in entries:
            if position in self._entries:
                raise ValueError(f"the journal has an entry of {position} already")
            lines.append({**asdict(position), "entry": dict(entry)})
        if lines:
            self._remember(self._append({"entries": lines}))

    def drop(self) -> None:
        """Delete the journal: its update is complete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; it stays. A line that a thread is writing is written and synced first."""
        with self._write_lock, self._sync_lock:
            if self._descriptor is None:
                return
            if self._synced < self._written:
                os.fsync(self._descriptor)
                self._synced = self._written
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self) -> int:
        """Read the entries; returns the length of the lines that count."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                content = _read_line(line)
                if content is None or not self._takes(content, is_first=not end):
                    break
                end += len(line)
        return end

    def _takes(self, content: dict[str, Any], is_first: bool) -> bool:
        """Remember what a line holds; returns False for a line that does not belong there."""
        if is_first:
            return content.get("kind") == HEADER and content.get("key") == self.key
        try:
            self._remember(content)
        except (KeyError, TypeError):
            return False
        return True

    def _remember(self, content: dict[str, Any]) -> None:
        # All positions first: of a line that does not belong here nothing is taken.
        names = [field.name for field in fields(Position)]
        positions = [Position(**{name: line[name] for name in names}) for line in content["entries"]]
        for position, line in zip(positions, content["entries"], strict=True):
            self._entries[position] = line["entry"]

    def _append(self, content: dict[str, Any]) -> dict[str, Any]:
        """Write a line and sync it; returns it as it reads back."""
        text = json.dumps(seal(content)).encode("ascii") + b"\n"
        with self._write_lock:
            if self._descriptor is None:
                raise ValueError(f"the journal {self.path} is closed")
            # Drop what a kill or a full disk left behind the last line that counts.
            os.ftruncate(self._descriptor, self._end)
            written = 0
            while written < len(text):
                written += os.pwrite(self._descriptor, text[written:], self._end + written)
            self._end += len(text)
            self._written += 1
            ticket = self._written
        with self._sync_lock:
            # Another thread's sync may have covered these lines.
            if self._synced < ticket:
                covered = self._written
                os.fsync(self._descriptor)
                self._synced = covered
        read: dict[str, Any] = json.loads(text)
        return read


def _read_line(line: bytes) -> dict[str, Any] | None:
    """Return the content of a line; None for one that is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        return open_sealed(json.loads(line))
    except (ValueError, RecursionError):
        return None
