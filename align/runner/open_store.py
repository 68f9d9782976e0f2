"""Open a store as the user says, and open the same one in jobs and tasks that work for a run.

Knows no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from align.config.runtime import StoreConfig
from align.config.user_paths import user_path
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.store.locks import Lease
from align.store.object_store import check_address
from align.store.retry import SECONDS
from align.store.store import Store


@dataclass(frozen=True)
class Opening:
    """All that decides which store is opened, in plain values that another machine can be given; nothing secret."""

    folder: str
    lease: float = Lease.seconds
    """Seconds."""
    patience: float = SECONDS
    """Seconds."""
    remote: str | None = None
    """Address of a bucket."""

    @classmethod
    def of(cls, store: Store) -> Opening:
        """Return the settings that open the same store from any working folder, on every machine that sees it."""
        remote = None if store.remote is None else store.remote.address
        return cls(str(store.root.resolve()), store.lease.seconds, store.retry.seconds, remote)

    def open(self) -> Store:
        """The store, made where nothing is; ``UserError`` where it cannot be used."""
        store = Store.open(user_path(self.folder), lease=self.lease, retry_seconds=self.patience)
        if self.remote is not None:
            store.connect(self.remote)
        return store


def open_store(pipeline: Pipeline | None = None, store: str | Path | Store | None = None) -> Store:
    """The store: the argument, else ``$ALIGN_STORE``, else ``runtime.store``, else ``./store``.

    Each may be a folder or the address of a bucket, and leaves the other to those that come after it.
    """
    if isinstance(store, Store):
        return store
    settings = pipeline.config.runtime.store if pipeline is not None else StoreConfig()
    choices = [("--store", str(store or "")), ("$ALIGN_STORE", os.environ.get("ALIGN_STORE", ""))]
    folders = [word for _, word in choices if word and "://" not in word]
    remote = settings.remote
    for name, word in choices:
        if "://" in word:
            try:
                remote = check_address(word)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            break
    return Opening([*folders, settings.folder or "store"][0], settings.lease, settings.patience, remote).open()
