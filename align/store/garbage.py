"""Garbage collection of a store: folders that no named run and no active run reaches. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from align.errors import UserError
from align.store.leases import LEASES, RUNS
from align.store.record import StageReference
from align.store.store import Store

DELETED = "deleted"
IN_USE = "in use"
"""States of a folder after ``delete_garbage``; any other says why the folder could not be deleted."""


def find_garbage(store: Store, used: Iterable[StageReference] = ()) -> list[Path]:
    """Return artifact and partial folders that no named run and no active run reaches, directly or as an input.

    ``used`` are further stages that count as reached. Raises ``UserError`` if it is unknown what is reached.
    """
    reached = store.retry.call(lambda: _reached_folders(store, used))
    unreached = [folder for folder in store.folders() if folder not in reached]
    # A linked kind may be another store's, whose runs are unknown here, so gc deletes nothing below one.
    return [folder for folder in unreached if not folder.parent.is_symlink()]


def delete_garbage(store: Store, used: Callable[[], Iterable[StageReference]] = tuple) -> dict[Path, str]:
    """Delete the garbage; returns folder → ``DELETED``, ``IN_USE`` if a run holds its lock, or an error's text.

    ``used`` is called for further stages once no run can begin. Raises as ``find_garbage``.
    """
    # 1. Find the leases of runs that have died. That may last as long as a lease, so runs may still begin meanwhile.
    ended = store.leases.find_ended()
    # 2. From here to the end no run begins, so nothing that is unreached now can become reached.
    with store.leases.gate():
        store.leases.drop(ended)
        # 3. Another machine may have begun a run a moment ago, which NFS's caches do not show.
        store.refresh(RUNS, LEASES)
        # 4. Delete what is unreached, unless a run holds its lock.
        return {folder: _delete(store, folder) for folder in find_garbage(store, used())}


def _delete(store: Store, folder: Path) -> str:
    """Delete one folder and return its state. Its error must not keep the other folders from being deleted."""
    try:
        return DELETED if store.delete(folder) else IN_USE
    except OSError as error:
        return f"cannot be deleted ({error.strerror or error}: {error.filename or folder})"


def _reached_folders(store: Store, used: Iterable[StageReference]) -> set[Path]:
    """Return the folders of all stages that runs reach, inputs of inputs included."""
    runs, damaged = store.survey_runs()
    if damaged:
        raise UserError(f"{damaged[0]} Until then nothing is deleted, since it is unknown what that run needs.")
    reached = {(stage["kind"], stage["key"]) for run in runs.values() for stage in run["stages"].values()}
    reached |= {(stage.kind, stage.key) for uses in store.leases.uses() for stage in uses.stages.values()}
    reached |= {(stage.kind, stage.key) for stage in used}
    queue = list(reached)
    while queue:
        artifact = store.find_intact(*queue.pop())
        if artifact is None:
            continue
        # Inputs of a reached artifact are reached, even of a run without a record.
        for source in artifact.record["input_stages"]:
            stage = (source["kind"], source["key"])
            if stage not in reached:
                reached.add(stage)
                queue.append(stage)
    folders = set()
    for kind, key in reached:
        # Partials stay, too: an interrupted stage resumes from its checkpoints there, and a download where it stopped.
        folders |= {store.folder(kind, key), store.partial(kind, key), store.fetched(kind, key)}
        folders -= set(store.leftovers(kind, key))
    return folders
