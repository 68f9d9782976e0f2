"""Where finished stages live: keys, locks, records, atomic publishing. Knows no torch.

Layout: ``<root>/align-store.json`` marks a store; ``<root>/<stage kind>/<12 hex>/`` is an artifact, done if and
only if it holds ``record.json``; ``<12 hex>.partial/`` is work in progress (``<12 hex>.<number>.partial/`` where it was
taken over from a holder of the lock that fell silent); ``<root>/locks/`` holds the locks,
``<root>/leases/`` what runs under way use and ``<root>/runs/<name>.json`` what each named run reached last.
``<root>/reports/<name>/`` has the page about that run,
``<root>/cache/`` what only saves time, ``<root>/sweeps/<name>/`` what a sweep has tried,
``<root>/jobs/<name>/`` what of a run was handed to a cluster.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from align.errors import UserError
from align.store.artifacts import Artifact, Kind
from align.store.atomic_write import sync_folder
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.leases import LEASES, RunLeases, Stages, UsedStage, Uses
from align.store.locks import Hold, Lease, Lock, LockLost
from align.store.marker import open_folder, require_mark
from align.store.output_files import Problem, differing, output_digests
from align.store.record import RECORD, DamagedRecord, read_artifact, write_record
from align.store.retry import SECONDS, Patience, forget_cached, patient

if TYPE_CHECKING:
    from align.store.remote import Remote

SHORT = 12
REPORTS = "reports"
SWEEPS = "sweeps"
JOBS = "jobs"
RUNS = "runs"
NO_KINDS = ("locks", RUNS, "cache", LEASES, REPORTS, SWEEPS, JOBS)
"""Folders of a store that hold no artifacts."""


class RememberedRun(BaseModel):
    """The content of ``runs/<name>.json``."""

    model_config = ConfigDict(strict=True)

    name: str
    when: float
    """Seconds since the epoch."""
    stages: dict[str, UsedStage]
    pipeline: dict[str, Any]
    """As parsed YAML."""


class DamagedRun(UserError):
    """The file about a named run cannot be used."""

    def __init__(self, path: Path, finding: str) -> None:
        self.name = path.stem
        super().__init__(
            f"{path}: damaged: it {finding}. Run the pipeline of '{path.stem}' again to write it anew, or delete it if "
            "that run is no longer needed."
        )


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
        """Where stages keep what only saves time: sampled responses, judgments. May be deleted while nothing runs."""
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
        """The finished artifact of ``key``, or None. ``stage`` is the name it has in the asking pipeline.

        Raises ``DamagedRecord`` where one is there whose record cannot be used.
        """
        folder = self.folder(kind, key)
        artifact = self._read(folder, stage)
        if artifact is not None and artifact.record["key"] != key:
            raise DamagedRecord(folder / RECORD, f"is the record of key {artifact.record['key']}", stage)
        return artifact

    def find_intact(self, kind: str, key: str, stage: str = "") -> Artifact | None:
        """As ``find``, but None where the record is damaged."""
        try:
            return self.find(kind, key, stage)
        except DamagedRecord:
            return None

    def _read(self, folder: Path, stage: str = "") -> Artifact | None:
        try:
            artifact = read_artifact(folder, stage)
        except (FileNotFoundError, NotADirectoryError):
            require_mark(self.root)
            return None
        kind, key = artifact.record["kind"], artifact.record["key"]
        if (kind, key[:SHORT]) != (folder.parent.name, folder.name):
            raise DamagedRecord(folder / RECORD, f"is the record of {kind}/{key[:SHORT]}", stage)
        return artifact

    @patient
    def survey(self) -> tuple[list[Artifact], list[DamagedRecord]]:
        """Every finished artifact, oldest first, and those whose records are damaged."""
        intact, damaged = [], []
        for folder in self._folders():
            if folder.suffix:
                continue
            try:
                artifact = self._read(folder)
            except DamagedRecord as error:
                damaged.append(error)
                continue
            if artifact is not None:
                intact.append(artifact)
        return sorted(intact, key=lambda artifact: str(artifact.record["created"])), damaged

    def all(self) -> list[Artifact]:
        """Every finished artifact whose record is intact, oldest first."""
        return self.survey()[0]

    def resolve(self, prefix: str) -> Artifact:
        """The one artifact whose key starts with ``prefix`` (``kind/prefix`` works too)."""
        kind, _, key = prefix.rpartition("/")
        intact, damaged = self.survey()
        found = [
            artifact
            for artifact in intact
            if str(artifact.record["key"]).startswith(key) and (not kind or artifact.record["kind"] == kind)
        ]
        for error in damaged:
            folder = Path(error.path).parent
            if key and folder.name.startswith(key[:SHORT]) and (not kind or folder.parent.name == kind):
                raise error
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
                self._look_again(kind)
            if hold.after_silence:
                self.patience.keep_trying(lambda: self._take_over(kind, key, hold))
            yield hold
        finally:
            self.patience.keep_trying(hold.release)

    def _lock(self, kind: str, key: str) -> Lock:
        return Lock(self.root / "locks" / f"{kind}-{key[:SHORT]}", self.lease)

    @patient
    def _look_again(self, *names: str) -> None:
        """See what another machine has put into folders of the store a moment ago."""
        for name in names:
            if (self.root / name).is_dir():
                forget_cached(self.root / name)

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
        write_record(output, record)
        sync_folder(output)
        if hold is not None:
            hold.confirm()
        if folder.exists():  # a rebuild: the old one steps aside only now that the new one is whole
            found = self._read_intact(folder)
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
        found = self._read_intact(folder)
        return found is not None and found.record["created"] == record.get("created")

    def _read_intact(self, folder: Path) -> Artifact | None:
        try:
            return self._read(folder)
        except DamagedRecord:
            return None

    def _published(self, folder: Path) -> Artifact:
        sync_folder(folder.parent)
        artifact = self._read(folder)
        assert artifact is not None
        return artifact

    @patient
    def problems(self, artifact: Artifact, thorough: bool) -> list[Problem]:
        """Files that differ from the record; see ``align.store.output_files``."""
        return differing(artifact, thorough)

    @patient
    def remember_run(self, name: str, stages: Stages, pipeline: dict[str, Any]) -> None:
        """Note what a named run reaches, for ``gc``, ``plan`` and ``explain``."""
        (self.root / RUNS).mkdir(exist_ok=True)
        about = {"name": name, "when": time.time(), "stages": stages, "pipeline": pipeline}
        write_sealed(self.root / RUNS / f"{name}.json", about)

    @contextlib.contextmanager
    def use(self, name: str, stages: Stages, pipeline: dict[str, Any]) -> Iterator[None]:
        """Remember a run, and hold a lease on its stages until the block ends."""
        with self._leases.hold(name, stages):
            self.remember_run(name, stages, pipeline)
            yield

    def uses(self) -> list[Uses]:
        """What runs under way use, as far as one look can tell. Raises ``UserError`` where that is not known."""
        return self._leases.uses()

    @property
    def _leases(self) -> RunLeases:
        return RunLeases(self.root, self.lease, self.patience)

    @patient
    def survey_runs(self) -> tuple[dict[str, dict[str, Any]], list[DamagedRun]]:
        """Named runs, as remembered last, and those whose files are damaged."""
        intact, damaged = {}, []
        for path in sorted((self.root / RUNS).glob("*.json")):
            try:
                run = read_sealed(path, RememberedRun)
                if run.name != path.stem:
                    raise DamagedFile(f"is about the run '{run.name}'")
                intact[path.stem] = run.model_dump()
            except DamagedFile as error:
                damaged.append(DamagedRun(path, str(error)))
            except FileNotFoundError:  # deleted since the folder was listed
                continue
        return intact, damaged

    def runs(self) -> dict[str, dict[str, Any]]:
        """Named runs whose files are intact, as remembered last."""
        return self.survey_runs()[0]

    def garbage(self, used: Iterable[UsedStage] = ()) -> list[Path]:
        """Artifact and partial folders that no named run and no run under way reaches, directly or as an input.

        ``used`` are more stages that count as reached. Raises ``UserError`` where it cannot be told what is reached.
        """
        kept = self._reached(used)
        return [folder for folder in self._folders() if folder not in kept]

    def delete_garbage(self, used: Callable[[], Iterable[UsedStage]] = tuple) -> dict[Path, bool]:
        """Delete it; which folders were deleted, and which not since a run holds their locks.

        No run begins meanwhile. ``used`` is asked once none can. Raises as ``garbage``.
        """
        ended = self._leases.find_ended()
        with self._leases.gate():
            self._leases.drop(ended)
            self._look_again(RUNS, LEASES)
            return {folder: self.delete(folder) for folder in self.garbage(used())}

    @patient
    def _reached(self, used: Iterable[UsedStage]) -> set[Path]:
        runs, damaged = self.survey_runs()
        if damaged:
            raise UserError(f"{damaged[0]} Until then everything is kept, since it is not known what that run needs.")
        reached = {(stage["kind"], stage["key"]) for run in runs.values() for stage in run["stages"].values()}
        reached |= {(stage.kind, stage.key) for uses in self.uses() for stage in uses.stages.values()}
        reached |= {(stage.kind, stage.key) for stage in used}
        queue = list(reached)
        while queue:
            kind, key = queue.pop()
            artifact = self.find_intact(kind, key)
            for link in artifact.record["input_stages"] if artifact else []:
                if (link["kind"], link["key"]) not in reached:
                    reached.add((link["kind"], link["key"]))
                    queue.append((link["kind"], link["key"]))
        return {folder for kind, key in reached for folder in (self.folder(kind, key), self.partial(kind, key))}

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
