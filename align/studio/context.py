"""The store and the settings that every view of the studio gets."""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.registry import NAME_PATTERN
from align.runner.open_store import Opening
from align.runs.run_page import RunOutline, stored_outline
from align.store.leases import RUNS, read_run
from align.store.store import NO_KINDS, Store
from align.studio.run_index import RunIndex

NAMES: Mapping[str, re.Pattern[str]] = {
    "run": re.compile(NAME_PATTERN),
    "stage": re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,79}"),
    "kind": re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,79}"),
    "key": re.compile(r"[0-9a-f]{6,64}"),
    "set": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"),
    "file": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}"),
}
"""Meaning of a part of an address, and the names that it accepts: none has a slash or begins with a dot."""
MAX_SHOWN = 80


class NotFound(UserError):
    """The address names a run, stage, artifact or file that does not exist; the answer has the status 404."""


class Refused(UserError):
    """The studio does not do what the request asks; the answer has the status 403."""


@dataclass(frozen=True)
class StudioContext:
    """The store of a studio, and its permission to write into it."""

    store: Store
    read_only: bool = False
    """True if ``--read-only`` forbids every action that writes."""
    chat_keys: frozenset[str] = frozenset()
    """Environment variables with keys that the chat may send to endpoints."""
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    """Key of the tickets of report pages (``security.report_ticket``)."""

    @functools.cached_property
    def opening(self) -> Opening:
        """Plain values that open the same store in another process."""
        return Opening.of(self.store)

    @functools.cached_property
    def index(self) -> RunIndex:
        """The runs of the store with the states of their stages, which all views share."""
        return RunIndex(self.store)

    @functools.cached_property
    def root(self) -> Path:
        """The store's folder without links."""
        return self.store.root.resolve()

    @property
    def is_writable(self) -> bool:
        """False with ``--read-only``, and for a store that this process may only read."""
        return not self.read_only and self.store.is_writable

    def require_writable(self) -> None:
        """Raise ``Refused`` if the studio only reads the store."""
        if self.read_only:
            raise Refused("This studio only reads: it was started with --read-only. Start it again without the option.")
        if not self.store.is_writable:
            raise Refused(f"{self.store.root}: this process may only read the store.")

    def outline(self, run: str) -> RunOutline:
        """Return the run of this name. Raises ``NotFound`` for another name, and ``UserError`` for a damaged run."""
        name = checked_name("run", run)
        try:
            return stored_outline(name, read_run(self.store.root / RUNS / f"{name}.json"))
        except FileNotFoundError:
            raise NotFound(f"The store has no run '{name}'.{suggest(name, self.store.runs())}") from None

    def artifact_folder(self, kind: str, key: str) -> Path:
        """Return the folder of the finished artifact of a kind and the beginning of a key.

        Raises ``NotFound`` if the store has none, ``UserError`` for names that no artifact has.
        """
        if checked_name("kind", kind) in NO_KINDS:
            raise NotFound(f"The store has no artifacts of the kind '{kind}'.")
        folder = self.inside(kind, checked_name("key", key)[:12])
        if not (folder / "record.json").is_file():
            raise NotFound(f"The store has no finished artifact {kind}/{key[:12]}.")
        return folder

    def inside(self, *parts: str) -> Path:
        """Return a path below the store. Raises ``NotFound`` if it leads out of the store, also through a link."""
        path = self.root.joinpath(*(checked_name("file", part) for part in parts)).resolve()
        if not path.is_relative_to(self.root) or path == self.root:
            raise NotFound(f"{'/'.join(parts)[:MAX_SHOWN]}: is not a path of the store.")
        return path


def checked_name(meaning: str, text: Any) -> str:
    """Return a part of an address that names something of the store.

    Args:
        meaning: A key of ``NAMES``.

    Raises:
        UserError: for text that no such thing can have as its name.
    """
    if not isinstance(text, str) or not NAMES[meaning].fullmatch(text) or text.endswith("."):
        raise UserError(f"{str(text)[:MAX_SHOWN]!r} is not the name of a {meaning}.")
    return text
