"""Where finished stages live: keys, locks, records, atomic publishing. Knows no torch.

Layout: ``<root>/align-store.json`` marks a store; ``<root>/<stage kind>/<12 hex>/`` is an artifact, done if and
only if it holds ``record.json``; ``<12 hex>.partial/`` is work in progress (``<12 hex>.<number>.partial/`` where it was
taken over from a holder of the lock that fell silent); ``<root>/locks/`` holds the locks and
``<root>/runs/<name>.json`` what each named run reached last. ``<root>/reports/<name>/`` has the page about that run,
``<root>/cache/`` what only saves time, ``<root>/sweeps/<name>/`` what a sweep has tried,
``<root>/jobs/<name>/`` what of a run was handed to a cluster.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.artifacts import Artifact, Kind
from align.errors import UserError
from align.locking import Hold, Lease, Lock, LockLost
from align.outputs import RECORD, Problem, differing, output_digests
from align.shared_folder import SECONDS, Patience, forget_cached, patient
from align.store_mark import open_folder, require_mark
from align.whole_files import sync_folder, write_atomically

if TYPE_CHECKING:
    from align.remote import Remote

SHORT = 12
REPORTS = "reports"
SWEEPS = "sweeps"
JOBS = "jobs"
NO_KINDS = ("locks", "runs", "cache", REPORTS, SWEEPS, JOBS)
"""Folders of a store that hold no artifacts."""


class Store:
    """A folder of artifacts. Make one with :meth:`open`.

    Its file system may be shared by many machines and be away for a while: what reads and writes here is repeated for
    ``patience`` seconds, then ``StoreUnreachable`` is raised. ``lease`` is how long a lock outlives a silent holder.
    """

    def __init__(self, root: Path, *, lease: float | None = None, patience: float = SECONDS) -> None:
        self.root = root
        self.lease = Lease() if lease is None else Lease(lease, min(lease / 6, Lease.every))
        self.patience = Patience(root, patience)
        self.remote: Remote | None = None

    @classmethod
    def open(cls, root: Path, *, lease: float | None = None, patience: float = SECONDS) -> Store:
        """Open a store, making it where nothing is; ``UserError`` where it cannot be used or is something else."""
        store = cls(root, lease=lease, patience=patience)
        store.patience.keep_trying(lambda: open_folder(root))
        return store

    @property
    def cache(self) -> Path:
        """Where stages keep what only saves time: sampled responses, judgements. May be deleted at any time."""
        return self.root / "cache"

    def folder(self, kind: str, key: str) -> Path:
        """Where the artifact of ``key`` lies once it is done."""
        return self.root / kind / key[:SHORT]

    def partial(self, kind: str, key: str) -> Path:
        """Where the artifact of ``key`` is being made."""
        plain = self.root / kind / f"{key[:SHORT]}.partial"
        taken_over = list(plain.parent.glob(f"{key[:SHORT]}.*.partial"))
        return max(taken_over, key=_number_of, default=plain)

    @patient
    def find(self, kind: str, key: str, stage: str = "") -> Artifact | None:
        """The finished artifact of ``key``, or None. ``stage`` is the name it has in the asking pipeline."""
        artifact = self._read(self.folder(kind, key), stage)
        return artifact if artifact is not None and artifact.record.get("key") == key else None

    def _read(self, folder: Path, stage: str = "") -> Artifact | None:
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            return Artifact(stage or record["stage"], Kind(record["makes"]), folder, record)
        except FileNotFoundError:
            require_mark(self.root)
            return None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, ValueError):
            raise UserError(
                f"{folder / RECORD}: damaged. Delete the folder {folder} and run again to rebuild the stage."
            ) from None

    @patient
    def all(self) -> list[Artifact]:
        """Every finished artifact, oldest first."""
        found = [
            artifact
            for folder in self._folders()
            if folder.suffix == "" and (artifact := self._read(folder)) is not None
        ]
        return sorted(found, key=lambda artifact: str(artifact.record.get("created", "")))

    def resolve(self, prefix: str) -> Artifact:
        """The one artifact whose key starts with ``prefix`` (``kind/prefix`` works too)."""
        kind, _, key = prefix.rpartition("/")
        found = [
            artifact
            for artifact in self.all()
            if str(artifact.record["key"]).startswith(key) and (not kind or artifact.record["kind"] == kind)
        ]
        if not found and key and self.remote is not None:
            found = self._from_afar(kind, key)
        if key and len(found) == 1:
            return found[0]
        if not found:
            raise UserError(f"{self.root}: no artifact's key starts with '{prefix}'; `align list` shows them.")
        keys = ", ".join(f"{a.record['kind']}/{a.record['key'][:SHORT]}" for a in found[:5])
        raise UserError(f"'{prefix}' fits {len(found)} artifacts ({keys}, …); give more of the key.")

    def _from_afar(self, kind: str, key: str) -> list[Artifact]:
        """Artifacts of the remote whose keys start with ``key``, fetched when there is one."""
        assert self.remote is not None
        found = [
            record
            for record in self.remote.all()
            if str(record["key"]).startswith(key) and (not kind or record["kind"] == kind)
        ]
        if len(found) == 1:
            artifact = self.remote.fetch(found[0]["kind"], found[0]["key"])
            return [] if artifact is None else [artifact]
        return [Artifact(one["stage"], Kind(one["makes"]), self.folder(one["kind"], one["key"]), one) for one in found]

    def obtain(self, kind: str, key: str, stage: str = "") -> Artifact | None:
        """The finished artifact of ``key``, fetched from the remote where it is only there; or None."""
        found = self.find(kind, key, stage)
        return self.remote.fetch(kind, key, stage) if found is None and self.remote is not None else found

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, on_wait: Callable[[str], None]) -> Iterator[Hold]:
        """Hold the stage's lock; a second run waits, and ``on_wait`` is told once who holds it.

        What a silent holder was making is moved to a name of this holder's own, so that nothing which the other still
        does when it wakes up arrives there.
        """

        def waits(holder: str) -> None:
            waited.append(holder)
            on_wait(holder)

        waited: list[str] = []
        hold = self._lock(kind, key).acquire(waits, self.patience)
        try:
            if waited or hold.after_silence:
                self.patience.keep_trying(lambda: self._look_again(kind))
            if hold.after_silence:
                self.patience.keep_trying(lambda: self._take_over(kind, key, hold))
            yield hold
        finally:
            self.patience.keep_trying(hold.release)

    def _lock(self, kind: str, key: str) -> Lock:
        return Lock(self.root / "locks" / f"{kind}-{key[:SHORT]}", self.lease)

    def _look_again(self, kind: str) -> None:
        """See what another machine has put there a moment ago."""
        if (self.root / kind).is_dir():
            forget_cached(self.root / kind)

    def _take_over(self, kind: str, key: str, hold: Hold) -> None:
        before = self.partial(kind, key)
        if before.is_dir() and _number_of(before) < hold.number:
            before.rename(before.with_name(f"{key[:SHORT]}.{hold.number}.partial"))

    @patient
    def is_locked(self, kind: str, key: str) -> bool:
        """Whether a run is making the artifact of ``key`` right now."""
        return self._lock(kind, key).is_held()

    @patient
    def holder_of(self, kind: str, key: str) -> dict[str, Any] | None:
        """``pid`` and ``host`` of who holds the lock of ``key``, as it noted them; None where nobody does."""
        return self._lock(kind, key).holder()

    @patient
    def publish(
        self, output: Path, record: dict[str, Any], hold: Hold | None = None, replaces: Artifact | None = None
    ) -> Artifact:
        """Write the record into ``output`` last and move the folder to its final name in one rename.

        ``replaces`` is the artifact of that name which was there when the lock was taken. Raises ``LockLost`` and
        publishes nothing where ``hold`` was lost meanwhile, or another artifact was published under the name.
        """
        folder = self.folder(record["kind"], record["key"])
        if not output.is_dir() and self._is(folder, record):  # the answer to an earlier rename was lost on its way
            return self._published(folder)
        if hold is not None:
            hold.confirm()
        record["outputs"] = output_digests(output)
        write_atomically(output / RECORD, record)
        sync_folder(output)
        if hold is not None:
            hold.confirm()
        if folder.exists():  # a rebuild: the old one steps aside only now that the new one is whole
            found = self._read(folder)
            if hold is not None and found is not None and not (replaces and self._is(folder, replaces.record)):
                raise LockLost(f"{folder} was published by another run while this one was silent")
            aside = folder.with_name(f"{folder.name}.old-{uuid.uuid4().hex[:8]}")
            folder.rename(aside)
            try:
                output.rename(folder)
            except BaseException:
                aside.rename(folder)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            output.rename(folder)
        return self._published(folder)

    def _is(self, folder: Path, record: dict[str, Any]) -> bool:
        found = self._read(folder)
        return found is not None and found.record.get("created") == record.get("created")

    def _published(self, folder: Path) -> Artifact:
        sync_folder(folder.parent)
        artifact = self._read(folder)
        assert artifact is not None
        return artifact

    @patient
    def problems(self, artifact: Artifact, thorough: bool) -> list[Problem]:
        """Files that differ from the record; see ``align.outputs``."""
        return differing(artifact, thorough)

    @patient
    def remember_run(self, name: str, stages: dict[str, dict[str, str]], pipeline: dict[str, Any]) -> None:
        """Note what a named run reaches, for ``gc``, ``plan`` and ``explain``."""
        (self.root / "runs").mkdir(exist_ok=True)
        write_atomically(
            self.root / "runs" / f"{name}.json",
            {"name": name, "when": time.time(), "stages": stages, "pipeline": pipeline},
        )

    @patient
    def runs(self) -> dict[str, dict[str, Any]]:
        """Named runs, as remembered last."""
        found = {}
        for path in sorted((self.root / "runs").glob("*.json")):
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @patient
    def garbage(self) -> list[Path]:
        """Artifact and partial folders that no named run reaches, directly or as an input."""
        reached = {
            (entry["kind"], entry["key"]) for run in self.runs().values() for entry in run.get("stages", {}).values()
        }
        queue = list(reached)
        while queue:
            kind, key = queue.pop()
            artifact = self.find(kind, key)
            for link in artifact.record.get("input_stages", []) if artifact else []:
                if (link["kind"], link["key"]) not in reached:
                    reached.add((link["kind"], link["key"]))
                    queue.append((link["kind"], link["key"]))
        kept = {folder for kind, key in reached for folder in (self.folder(kind, key), self.partial(kind, key))}
        return [folder for folder in self._folders() if folder not in kept]

    def _folders(self) -> list[Path]:
        """Every artifact and partial folder."""
        kinds = [path for path in sorted(self.root.iterdir()) if path.is_dir() and path.name not in NO_KINDS]
        return [folder for kind in kinds for folder in sorted(kind.iterdir()) if folder.is_dir()]

    def delete(self, folder: Path) -> bool:
        """Delete one folder unless a run holds its lock; the record goes first, so half a folder is never 'done'."""
        hold = self.patience.keep_trying(self._lock(folder.parent.name, folder.name[:SHORT]).try_acquire)
        if hold is None:
            return False
        try:
            (folder / RECORD).unlink(missing_ok=True)
            shutil.rmtree(folder)
        finally:
            hold.release()
        return True

    def drop_partials(self, kind: str, key: str) -> None:
        """Delete what the making of a finished artifact has left, that of lost holders too."""
        for folder in (self.root / kind).glob(f"{key[:SHORT]}*.partial"):
            shutil.rmtree(folder, ignore_errors=True)


def _number_of(partial: Path) -> int:
    """The number of the lock under which a partial was taken over; 0 for one that never was."""
    number = partial.name.split(".")[1]
    return int(number) if number.isdecimal() else 0
