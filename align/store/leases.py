"""Runs of a store and the leases that keep their artifacts."""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from align.errors import UserError
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.locks import Hold, Lease, Lock
from align.store.record import StageReference
from align.store.retry import Retry

LEASES = "leases"
USES = "uses.json"
GATE = "gc"
Stages = Mapping[str, Mapping[str, str]]
"""Stage name → ``kind`` and ``key``."""


class Uses(BaseModel):
    """Content of ``uses.json``."""

    model_config = ConfigDict(strict=True)

    run: str
    stages: dict[str, StageReference]


class RunLeases:
    """The leases of a store's runs."""

    def __init__(self, root: Path, lease: Lease, retry: Retry) -> None:
        self.folder = root / LEASES
        self.lease = lease
        self.retry = retry
        self._gate = root / "locks" / GATE

    @contextlib.contextmanager
    def hold(self, run: str, stages: Stages) -> Iterator[None]:
        """Keep ``gc`` from the artifacts of these stages, also future artifacts, while inside the context."""
        folder = self.folder / f"{run}-{uuid.uuid4().hex[:12]}"
        uses = {"run": run, "stages": {name: dict(stage) for name, stage in stages.items()}}
        with contextlib.ExitStack() as lease:
            # Behind the gate: ``gc`` sees the complete lease, or has ended.
            with self.gate():
                # Killed runs must not accumulate. ``gc --delete`` watches leases of other machines; here one look has
                # to do, and inside the gate no lease is half made.
                self.drop({folder: Lock(folder, self.lease) for folder in self._folders()})
                hold = Lock(folder, self.lease).acquire(lambda _: None, self.retry)
                # Register the end before writing the uses: an error there must not leave a lease that is kept alive.
                lease.callback(_end, hold, folder)
                self.retry.call(lambda: write_sealed(folder / USES, uses))
            yield

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Exclude every other run that begins, and ``gc``, on any machine, while inside the context."""
        hold = Lock(self._gate, self.lease).acquire(self._log_wait, self.retry)
        try:
            yield
        finally:
            self.retry.call(hold.release)

    def _log_wait(self, holder: str) -> None:
        self.retry.log(f"waits until `align gc`, or another run that begins, is done in the store ({holder})")

    def find_ended(self) -> dict[Path, Lock]:
        """Return the leases whose runs have died, with the locks that were watched to tell.

        The call may last the lease's seconds if a run on another machine may be dead.
        """
        locks = {folder: Lock(folder, self.lease) for folder in self._folders()}
        if not locks:
            return {}
        # Watching each may last as long as a lease, so all are watched at once.
        with ThreadPoolExecutor(max_workers=min(32, len(locks))) as threads:
            alive = list(threads.map(self._is_alive, locks.values()))
        return {folder: lock for (folder, lock), lives in zip(locks.items(), alive, strict=True) if not lives}

    def drop(self, ended: Mapping[Path, Lock]) -> None:
        """Delete the leases of runs that are still as dead as ``find_ended`` saw them. Call it inside the gate."""
        for folder, lock in ended.items():
            # The lease was watched outside the gate, so its run may have come back since.
            if not lock.is_held():
                shutil.rmtree(folder, ignore_errors=True)

    def uses(self) -> list[Uses]:
        """Return what the active runs use. Raises ``UserError`` where that cannot be told."""
        uses = []
        for folder in self._folders():
            # The run has ended, or died; ``find_ended`` removes what it left.
            if not Lock(folder, self.lease).is_held():
                continue
            try:
                uses.append(read_sealed(folder / USES, Uses))
            except FileNotFoundError:
                if not folder.is_dir():  # the run has ended since
                    continue
                raise self._unreadable(folder, "is missing") from None
            except DamagedFile as error:
                raise self._unreadable(folder, str(error)) from None
        return uses

    def _unreadable(self, folder: Path, finding: str) -> UserError:
        return UserError(
            f"{folder / USES}: damaged: it {finding}. A run is active, and it is unknown what it uses, so nothing is "
            f"deleted. Wait until the run has ended, or delete {folder} if there is none."
        )

    def _is_alive(self, lock: Lock) -> bool:
        try:
            return lock.holder_lives(self.retry)
        except FileNotFoundError:  # it has ended meanwhile
            return True

    def _folders(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.is_dir())
        except FileNotFoundError:
            return []


def _end(hold: Hold, folder: Path) -> None:
    with contextlib.suppress(OSError):  # the lease then ends by itself
        hold.release()
    shutil.rmtree(folder, ignore_errors=True)


RUNS = "runs"


class RunRecord(BaseModel):
    """Content of ``runs/<name>.json``."""

    model_config = ConfigDict(strict=True)

    name: str
    when: float
    """Seconds since the epoch."""
    stages: dict[str, StageReference]
    pipeline: dict[str, Any]
    """As parsed YAML."""
    folder: str = ""
    """Folder in which the run was started and relative paths of the pipeline start; empty in older records."""
    modules: list[str] = []
    """Further folders with Python modules that the pipeline names."""


class DamagedRun(UserError):
    """The record of a named run cannot be used."""

    def __init__(self, path: Path, finding: str) -> None:
        self.name = path.stem
        super().__init__(
            f"{path}: damaged: it {finding}. Run the pipeline of '{path.stem}' again to rewrite it, or delete it if "
            "that run is no longer needed."
        )


def write_run(root: Path, name: str, stages: Stages, pipeline: dict[str, Any], modules: Sequence[str] = ()) -> None:
    """Record that the run ``name`` reaches ``stages``; ``root`` is the store's folder, ``modules`` as in the record."""
    (root / RUNS).mkdir(exist_ok=True)
    record = {"name": name, "when": time.time(), "stages": stages, "pipeline": pipeline}
    record |= {"folder": str(Path.cwd()), "modules": list(modules)}
    write_sealed(root / RUNS / f"{name}.json", record)


def read_runs(root: Path) -> tuple[dict[str, dict[str, Any]], list[DamagedRun]]:
    """Return name → content of the intact records, and the errors of the damaged records."""
    intact = {}
    damaged = []
    for path in sorted((root / RUNS).glob("*.json")):
        try:
            intact[path.stem] = read_run(path)
        except DamagedRun as error:
            damaged.append(error)
        except FileNotFoundError:  # deleted since the folder was listed
            continue
    return intact, damaged


def read_run(path: Path) -> dict[str, Any]:
    """Return the content of the record of one run. Raises ``DamagedRun``, or ``FileNotFoundError`` without a record."""
    try:
        run = read_sealed(path, RunRecord)
        if run.name != path.stem:
            raise DamagedFile(f"is about the run '{run.name}'")
    except DamagedFile as error:
        raise DamagedRun(path, str(error)) from None
    return run.model_dump()
