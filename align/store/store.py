"""The store of finished stages: keys, locks, records, atomic publishing. Knows no torch.

Layout below ``<root>``:

=============================  =====================================================================================
``align-store.json``           marks the folder as a store
``<kind>/<12 hex>/``           an artifact, done if and only if it holds ``record.json``
``<kind>/<12 hex>.partial/``   work in progress (``<12 hex>.<number>.partial/`` if it was taken over from a holder
                               of the lock that fell silent)
``locks/``                     the locks of stages
``leases/``                    the stages that active runs use
``runs/<name>.json``           the stages that each named run reached last
``reports/<name>/``            the page about that run
``cache/``                     files that only save time
``sweeps/<name>/``             the trials of a sweep
``jobs/<name>/``               the jobs of a run on a cluster
``annotations/<set>/``         pairs and the verdicts of annotators
=============================  =====================================================================================
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.store.annotations import ANNOTATIONS
from align.store.artifacts import OUTPUT, Artifact, Kind
from align.store.json_files import sync_folder
from align.store.leases import LEASES, RUNS, DamagedRun, RunLeases, Stages, read_runs, write_run
from align.store.locks import Hold, Lease, Lock, LockLost
from align.store.record import (
    RECORD,
    SHORT,
    DamagedRecord,
    Problem,
    find_problems,
    open_folder,
    output_digests,
    read_artifact,
    require_marker,
    write_record,
)
from align.store.remote import Remote
from align.store.retry import SECONDS, Retry, drop_nfs_cache, with_retry

REPORTS = "reports"
SWEEPS = "sweeps"
JOBS = "jobs"
FETCHED = ".fetched"
"""Suffix of the folder into which an artifact is downloaded."""
NO_KINDS = ("locks", RUNS, "cache", LEASES, REPORTS, SWEEPS, JOBS, ANNOTATIONS)
"""Folders of a store that hold no artifacts."""


class Store:
    """A folder of artifacts. Open it with :meth:`open`.

    Its file system may be shared by many machines and be away for a while: calls are repeated for ``retry_seconds``,
    then ``StoreUnreachable`` is raised. ``lease`` is how long a lock outlives a silent holder, in seconds. ``remote``
    is a bucket with further artifacts, which ``resolve`` and ``obtain`` fetch from.
    """

    def __init__(self, root: Path, *, lease: float | None = None, retry_seconds: float = SECONDS) -> None:
        self.root = root
        self.lease = Lease() if lease is None else Lease(lease, min(lease / 6, Lease.every))
        self.retry = Retry(root, retry_seconds)
        self.remote: Remote | None = None

    @classmethod
    def open(cls, root: Path, *, lease: float | None = None, retry_seconds: float = SECONDS) -> Store:
        """Open a store, creating it if there is none. Raises ``UserError`` if it cannot be used."""
        store = cls(root, lease=lease, retry_seconds=retry_seconds)
        store.retry.call(lambda: open_folder(root))
        return store

    @property
    @with_retry
    def is_writable(self) -> bool:
        """False for a store that this process may only read."""
        self.root.stat()  # an error of the file system is no missing permission
        return os.access(self.root, os.W_OK | os.X_OK)

    def require_writable(self) -> None:
        """Raise ``UserError`` for a store that this process may only read."""
        if not self.is_writable:
            raise UserError(
                f"{self.root}: the store is read-only here, so nothing can be run, fetched or deleted in it. Name a "
                "store that you may write to with --store. `align plan`, `status`, `report`, `compare`, `chat` and "
                "`explain` can read this one."
            )

    def connect(self, address: str) -> None:
        """Use the bucket at ``address`` as the remote."""
        self.remote = Remote(address, self.lease, self.retry)

    @property
    def cache(self) -> Path:
        """Folder of files that only save time: sampled responses, judgments. May be deleted while nothing runs."""
        return self.root / "cache"

    def folder(self, kind: str, key: str) -> Path:
        """Return the folder of the finished artifact of ``key``."""
        return self.root / kind / key[:SHORT]

    def partial(self, kind: str, key: str) -> Path:
        """Return the folder in which the artifact of ``key`` is in progress."""
        path = self.root / kind / f"{key[:SHORT]}.partial"
        taken_over = list(path.parent.glob(f"{key[:SHORT]}.*.partial"))
        return max(taken_over, key=_lock_number, default=path)

    def fetched(self, kind: str, key: str) -> Path:
        """Return the folder of a download in progress, the same at every attempt, so it can be continued."""
        return self.root / kind / f"{key[:SHORT]}{FETCHED}"

    @with_retry
    def find(self, kind: str, key: str, stage: str = "") -> Artifact | None:
        """Return the finished artifact of ``key``, or None. ``stage`` is its name in the calling pipeline.

        Raises ``DamagedRecord`` for an artifact whose record cannot be used.
        """
        folder = self.folder(kind, key)
        artifact = self._read(folder, stage)
        if artifact is not None and artifact.record["key"] != key:
            raise DamagedRecord(folder / RECORD, f"is the record of key {artifact.record['key']}", stage)
        return artifact

    def find_intact(self, kind: str, key: str, stage: str = "") -> Artifact | None:
        """Return the artifact as ``find`` does, but None if the record is damaged."""
        with contextlib.suppress(DamagedRecord):
            return self.find(kind, key, stage)
        return None

    def _read(self, folder: Path, stage: str = "") -> Artifact | None:
        try:
            artifact = read_artifact(folder, stage)
        except (FileNotFoundError, NotADirectoryError):
            # No record means "not finished" only if the store is there: an unmounted store looks empty.
            require_marker(self.root)
            return None
        kind, key = artifact.record["kind"], artifact.record["key"]
        if (kind, key[:SHORT]) != (folder.parent.name, folder.name):
            raise DamagedRecord(folder / RECORD, f"is the record of {kind}/{key[:SHORT]}", stage)
        return artifact

    @with_retry
    def survey(self) -> tuple[list[Artifact], list[DamagedRecord]]:
        """Return every finished artifact, oldest first, and the errors of those whose records are damaged."""
        intact, damaged = [], []
        for folder in self.folders():
            # Only drafts and downloads in progress have a suffix.
            if folder.suffix:
                continue
            try:
                artifact = self._read(folder)
                intact += [artifact] if artifact is not None else []
            except DamagedRecord as error:
                damaged.append(error)
        return sorted(intact, key=lambda artifact: str(artifact.record["created"])), damaged

    def all(self) -> list[Artifact]:
        """Return every finished artifact whose record is intact, oldest first."""
        return self.survey()[0]

    def resolve(self, prefix: str) -> Artifact:
        """Return the one artifact whose key starts with ``prefix`` (also as ``kind/prefix``), fetched if necessary.

        Raises ``UserError`` if there is none, or several.
        """
        kind, _, key = prefix.rpartition("/")
        intact, damaged = self.survey()
        matches = [artifact for artifact in intact if _matches(artifact.record, kind, key)]
        # A damaged record has no key to compare. Its folder is named by the key, so a record that could be meant is
        # reported.
        for error in damaged:
            folder = Path(error.path).parent
            if key and folder.name.startswith(key[:SHORT]) and (not kind or folder.parent.name == kind):
                raise error
        if not matches and key and self.remote is not None:
            matches = self._find_remote(self.remote, kind, key)
        if key and len(matches) == 1:
            return matches[0]
        if not matches:
            raise UserError(f"{self.root}: no artifact's key starts with '{prefix}'; `align list` shows them.")
        keys = ", ".join(f"{a.record['kind']}/{a.record['key'][:SHORT]}" for a in matches[:5])
        raise UserError(f"'{prefix}' fits {len(matches)} artifacts ({keys}, …); give more of the key.")

    def _find_remote(self, remote: Remote, kind: str, key: str) -> list[Artifact]:
        """Return the remote's artifacts whose keys start with ``key``; a single artifact is fetched."""
        records = [record for record in remote.all() if _matches(record, kind, key)]
        if len(records) == 1:
            artifact = self.fetch(records[0]["kind"], records[0]["key"])
            return [] if artifact is None else [artifact]
        return [
            Artifact(record["stage"], Kind(record["makes"]), self.folder(record["kind"], record["key"]), record)
            for record in records
        ]

    def obtain(self, kind: str, key: str, stage: str = "") -> Artifact | None:
        """Return the finished artifact of ``key``, fetched if only the remote has it; or None."""
        artifact = self.find(kind, key, stage)
        if artifact is None and self.remote is not None:
            return self.fetch(kind, key, stage)
        return artifact

    def fetch(self, kind: str, key: str, stage: str = "") -> Artifact | None:
        """Fetch an artifact from the remote, with every digest checked; None if it is not there.

        Continues where an earlier fetch was interrupted. Raises ``UserError`` for files that differ from their record.
        """
        if self.remote is None:
            return None
        record = self.remote.find(kind, key)
        if record is None:
            return None
        self.require_writable()
        with self.lock(kind, key, lambda _: None):
            artifact = self.find(kind, key, stage)
            if artifact is not None:  # another process has fetched it meanwhile
                return artifact
            folder, draft = self.folder(kind, key), self.fetched(kind, key)
            self.remote.download(record, draft)
            if folder.exists():  # without a record, so of no use
                _remove(folder)
            # The draft has its record already, so this one rename makes a finished artifact visible.
            draft.rename(folder)
            sync_folder(folder.parent)
        return self.find(kind, key, stage)

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, log: Callable[[str], None]) -> Iterator[Hold]:
        """Hold the stage's lock. A second run waits, and ``log`` gets the holder once.

        The partial of a holder that fell silent is renamed: it gets this holder's number. So the old holder cannot
        write into it when it wakes up.
        """
        waited_for: list[str] = []

        def log_wait(holder: str) -> None:
            waited_for.append(holder)
            log(holder)

        hold = self._lock(kind, key).acquire(log_wait, self.retry)
        try:
            # 1. The holder before may have published on another machine, which NFS's caches do not show.
            if waited_for or hold.after_silence:
                self.refresh(kind)
            # 2. A silent holder may wake up, so move its partial away from it.
            if hold.after_silence:
                self.retry.call(lambda: self._take_over(kind, key, hold))
            yield hold
        finally:
            self.retry.call(hold.release)

    def _lock(self, kind: str, key: str) -> Lock:
        return Lock(self.root / "locks" / f"{kind}-{key[:SHORT]}", self.lease)

    @with_retry
    def refresh(self, *names: str) -> None:
        """Drop NFS's caches of folders of the store, so other machines' latest changes show."""
        for name in names:
            if (self.root / name).is_dir():
                drop_nfs_cache(self.root / name)

    def _take_over(self, kind: str, key: str, hold: Hold) -> None:
        partial = self.partial(kind, key)
        if partial.is_dir() and _lock_number(partial) < hold.number:
            partial.rename(partial.with_name(f"{key[:SHORT]}.{hold.number}.partial"))

    @with_retry
    def is_locked(self, kind: str, key: str) -> bool:
        """Return True while a run works on the artifact of ``key``."""
        return self._lock(kind, key).is_held()

    @with_retry
    def holder_of(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return ``pid`` and ``host`` of the holder of the lock of ``key``; None if the lock is free."""
        return self._lock(kind, key).holder()

    @with_retry
    def publish(
        self, output: Path, record: dict[str, Any], hold: Hold | None = None, replaces: Artifact | None = None
    ) -> Artifact:
        """Write the record into ``output``, and move the folder to its final name by one rename.

        ``replaces`` is the artifact of that name from when the lock was acquired. Raises ``LockLost``, and publishes
        nothing, if ``hold`` was lost meanwhile, or another artifact was published under the name.
        """
        folder = self.folder(record["kind"], record["key"])
        # A repeated call: the rename was done, and only its answer was lost.
        if not output.is_dir() and self._has_record(folder, record):
            return self._read_published(folder)
        # 1. Hash the files, write the record last, and sync. That may last minutes, so the lock is confirmed around it.
        if hold is not None:
            hold.confirm()
        record["outputs"] = output_digests(output)
        write_record(output, record)
        sync_folder(output)
        if hold is not None:
            hold.confirm()
        # 2. One rename makes it visible.
        if folder.exists():
            self._check_replaceable(folder, hold, replaces)
            self._replace(folder, output)
        else:
            output.rename(folder)
        return self._read_published(folder)

    def _check_replaceable(self, folder: Path, hold: Hold | None, replaces: Artifact | None) -> None:
        """Raise ``LockLost`` if the folder has an intact artifact other than ``replaces``."""
        if hold is None or self._read_intact(folder) is None:
            return
        if replaces is None or not self._has_record(folder, replaces.record):
            raise LockLost(f"{folder} was published by another run while this one was silent")

    def _replace(self, folder: Path, output: Path) -> None:
        """Put ``output`` in the place of an old artifact, which comes back if that fails."""
        # A rename cannot replace a folder that has files, so the old one steps aside. After a kill between the two
        # renames neither has the name; the next run publishes the output, which is still in its partial.
        aside = folder.with_name(f"{folder.name}.old-{uuid.uuid4().hex[:8]}")
        folder.rename(aside)
        try:
            output.rename(folder)
        except BaseException:
            aside.rename(folder)
            raise
        with contextlib.suppress(OSError):  # ``gc`` deletes what remains
            _remove(aside)

    def _has_record(self, folder: Path, record: dict[str, Any]) -> bool:
        artifact = self._read_intact(folder)
        return artifact is not None and artifact.record["created"] == record.get("created")

    def _read_intact(self, folder: Path) -> Artifact | None:
        with contextlib.suppress(DamagedRecord):
            return self._read(folder)
        return None

    def _read_published(self, folder: Path) -> Artifact:
        # The rename must survive a power cut before anyone is told that the artifact is published.
        sync_folder(folder.parent)
        artifact = self._read(folder)
        assert artifact is not None
        return artifact

    @with_retry
    def problems(self, artifact: Artifact, thorough: bool) -> list[Problem]:
        """Return the files that differ from the record, as ``find_problems`` does."""
        return find_problems(artifact, thorough)

    @with_retry
    def remember_run(self, name: str, stages: Stages, pipeline: dict[str, Any], modules: Sequence[str] = ()) -> None:
        """Record what a named run reaches, for ``gc``, ``plan`` and ``explain``; ``modules`` are folders of modules."""
        write_run(self.root, name, stages, pipeline, modules)

    @contextlib.contextmanager
    def use(self, name: str, stages: Stages, pipeline: dict[str, Any], modules: Sequence[str] = ()) -> Iterator[None]:
        """Record a run, and hold a lease on its stages while inside the context."""
        with self.leases.hold(name, stages):
            self.remember_run(name, stages, pipeline, modules)
            yield

    @property
    def leases(self) -> RunLeases:
        """The leases of active runs."""
        return RunLeases(self.root, self.lease, self.retry)

    @with_retry
    def survey_runs(self) -> tuple[dict[str, dict[str, Any]], list[DamagedRun]]:
        """Return the records of named runs, and the errors of the damaged records."""
        return read_runs(self.root)

    def runs(self) -> dict[str, dict[str, Any]]:
        """Return the intact records of named runs."""
        return self.survey_runs()[0]

    def folders(self) -> list[Path]:
        """Return every artifact and partial folder, and every link in the place of such a folder."""
        kinds = [path for path in sorted(self.root.iterdir()) if path.is_dir() and path.name not in NO_KINDS]
        return [path for kind in kinds for path in sorted(kind.iterdir()) if path.is_dir() or path.is_symlink()]

    def delete(self, folder: Path) -> bool:
        """Delete a folder unless a run holds its lock; returns whether it was deleted. The target of a link stays."""
        hold = self.retry.call(self._lock(folder.parent.name, folder.name[:SHORT]).try_acquire)
        if hold is None:
            return False
        try:
            if not folder.is_symlink():
                # Delete the record first, so half a folder never counts as done.
                (folder / RECORD).unlink(missing_ok=True)
            _remove(folder)
        finally:
            hold.release()
        return True

    def drop_partials(self, kind: str, key: str) -> None:
        """Delete what running a finished stage has left, also by holders that lost the lock."""
        for folder in self._partials(kind, key):
            shutil.rmtree(folder, ignore_errors=True)

    def leftovers(self, kind: str, key: str) -> list[Path]:
        """Return the partials of a finished stage whose runner was killed after publishing it.

        A partial with an output belongs to a rebuild, which resumes from it.
        """
        folders = [folder for folder in self._partials(kind, key) if not (folder / OUTPUT).exists()]
        return folders if folders and self.find_intact(kind, key) is not None else []

    def drop_leftovers(self, kind: str, key: str) -> None:
        """Delete the ``leftovers`` of a stage unless a run holds its lock."""
        for folder in self.leftovers(kind, key):
            with contextlib.suppress(OSError):  # ``gc`` names what cannot be deleted
                self.delete(folder)

    def _partials(self, kind: str, key: str) -> list[Path]:
        return list((self.root / kind).glob(f"{key[:SHORT]}*.partial"))


def _remove(path: Path) -> None:
    """Delete a folder, or only the link if it is one: its target may be used by something else."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _lock_number(partial: Path) -> int:
    """Return the number of the lock under which a run took over a partial; 0 if no run took it over."""
    number = partial.name.split(".")[1]
    return int(number) if number.isdecimal() else 0


def _matches(record: dict[str, Any], kind: str, key: str) -> bool:
    """Return True for a record whose key starts with ``key``, of ``kind`` if that is not empty."""
    return str(record["key"]).startswith(key) and (not kind or record["kind"] == kind)
