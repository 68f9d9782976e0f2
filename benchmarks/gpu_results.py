"""The results of the evidence for a GPU: one JSON file for each part, written anew after every item.

``PART.json`` is ``{"items": {NAME: RESULT}, "listed": [NAME]}``; ``listed`` has the names of the tests, once pytest has
collected them. A result has ``skipped`` with the reason where the item cannot be run on the machine, ``failed`` with a
message, or numbers. ``seconds`` says how long it took, and ``machine`` has the card, the versions and the commit:
results of several cards may be in one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.store.json_files import write_text_atomically
from benchmarks.gpu_items import PARTS

Part = dict[str, Any]


class Results:
    """Results in a folder, after those of ``earlier`` folders; of an item the last folder's result counts."""

    def __init__(self, folder: Path, earlier: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.machine: dict[str, Any] = {}
        """The card, the versions and the commit of this command."""
        self.parts: dict[str, Part] = {part: empty_part() for part in PARTS}
        for source in (*earlier, folder):
            self._take_over(source)

    def _take_over(self, source: Path) -> None:
        for part, content in self.parts.items():
            stored = read_part(source / f"{part}.json")
            for name, result in stored["items"].items():
                # What could not be run is no news beside a number.
                if "skipped" not in result or name not in content["items"]:
                    content["items"][name] = result
            content["listed"] = stored["listed"] or content["listed"]

    def put(self, part: str, name: str, result: dict[str, Any]) -> None:
        """Keep an item's result, and write the part's file."""
        content = self.parts[part]
        if "skipped" in result and self.is_done(part, name):
            return
        content["items"][name] = {**result, "machine": self.machine}
        self.write(part)

    def write(self, *parts: str) -> None:
        """Write the files of some parts, by default of all that have a result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in parts or PARTS:
            content = self.parts[part]
            if content["items"]:
                write_text_atomically(self.folder / f"{part}.json", json.dumps(content, indent=1))

    def list_items(self, part: str, names: list[str]) -> None:
        """Keep the names of a part's items, and drop results of items that are not among them."""
        content = self.parts[part]
        content["listed"] = names
        content["items"] = {name: result for name, result in content["items"].items() if name in names}

    def listed(self, part: str) -> list[str]:
        """Return the names that ``list_items`` kept."""
        names: list[str] = self.parts[part]["listed"]
        return names

    def is_done(self, part: str, name: str, *, retry: bool = False) -> bool:
        """Return whether an item has a result; one that failed is run again where ``retry``."""
        result = self.parts[part]["items"].get(name)
        if result is None or "skipped" in result:
            return False
        return not (retry and "failed" in result)

    def longest(self, part: str) -> float | None:
        """Return the seconds of the longest item of a part; None without any."""
        return max(
            (result["seconds"] for result in self.parts[part]["items"].values() if "seconds" in result), default=None
        )

    def failed(self, parts: Iterable[str]) -> list[str]:
        """Return the names of the items that failed."""
        return [name for part in parts for name, result in self.parts[part]["items"].items() if "failed" in result]


def empty_part() -> Part:
    """Return the content of a part without results."""
    return {"items": {}, "listed": []}


def read_part(file: Path) -> Part:
    """Return a part's file; one that is not there has no items. Raises ``UserError`` for a damaged file."""
    if not file.is_file():
        return empty_part()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        # Older files name one machine for all of their results.
        machine = dict(content.get("machine", {}))
        items = {name: {"machine": machine, **result} for name, result in content["items"].items()}
        return {"items": items, "listed": list(content["listed"])}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: is not a file of results. Remove it, and its items are measured again.") from None
