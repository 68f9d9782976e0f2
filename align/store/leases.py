"""Leases of the runs that are under way, by which ``gc`` leaves alone what they use. Knows no torch.

A run takes a lease in ``<store>/leases/<name>-<12 hex>/``: a lock of its own (``locking.py``), which it keeps alive,
and ``uses.json``, which names its stages. A run that died loses its lease as it loses a lock: at once where its machine
can tell, else after the lease's seconds of silence. The gate (``locks/gc``) keeps a run from beginning while ``gc``
deletes.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from align.errors import UserError
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.locks import Hold, Lease, Lock
from align.store.record import Digest, Name
from align.store.retry import Patience

LEASES, USES, GATE = "leases", "uses.json", "gc"
Stages = Mapping[str, Mapping[str, str]]
"""Stage name → ``kind`` and ``key``."""


class UsedStage(BaseModel):
    """A stage's artifact, finished or not."""

    model_config = ConfigDict(strict=True)

    kind: Name
    key: Digest


class Uses(BaseModel):
    """The content of ``uses.json``."""

    model_config = ConfigDict(strict=True)

    run: str
    stages: dict[str, UsedStage]


class RunLeases:
    """The leases of a store's runs."""

    def __init__(self, root: Path, lease: Lease, patience: Patience) -> None:
        self.folder, self.lease, self.patience = root / LEASES, lease, patience
        self._gate = root / "locks" / GATE

    @contextlib.contextmanager
    def hold(self, run: str, stages: Stages) -> Iterator[None]:
        """Keep ``gc`` from what these stages have made, or will make, until the block ends."""
        folder = self.folder / f"{run}-{uuid.uuid4().hex[:12]}"
        uses = {"run": run, "stages": {name: dict(stage) for name, stage in stages.items()}}
        with contextlib.ExitStack() as lease:
            with self.gate():
                hold = Lock(folder, self.lease).acquire(lambda _: None, self.patience)
                lease.callback(_end, hold, folder)
                self.patience.keep_trying(lambda: write_sealed(folder / USES, uses))
            yield

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Alone among the runs that begin and the ``gc`` that deletes, on whatever machine."""
        hold = Lock(self._gate, self.lease).acquire(self._say_wait, self.patience)
        try:
            yield
        finally:
            self.patience.keep_trying(hold.release)

    def _say_wait(self, holder: str) -> None:
        self.patience.say(f"waits until `align gc`, or another run that begins, is done in the store ({holder})")

    def find_ended(self) -> dict[Path, Lock]:
        """Leases whose runs have died, and the locks that were watched to tell.

        Takes up to the lease's seconds where a run on another machine may be dead.
        """
        locks = {folder: Lock(folder, self.lease) for folder in self._folders()}
        if not locks:
            return {}
        with ThreadPoolExecutor(max_workers=min(32, len(locks))) as threads:
            lives = list(threads.map(self._lives, locks.values()))
        return {folder: lock for (folder, lock), alive in zip(locks.items(), lives, strict=True) if not alive}

    def drop(self, ended: Mapping[Path, Lock]) -> None:
        """Delete the leases of runs that are still as dead as ``find_ended`` saw them; to be done behind the gate."""
        for folder, lock in ended.items():
            if not lock.is_held():
                shutil.rmtree(folder, ignore_errors=True)

    def uses(self) -> list[Uses]:
        """What the runs under way use. Raises ``UserError`` where that cannot be told."""
        uses = []
        for folder in self._folders():
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
            f"{folder / USES}: damaged: it {finding}. A run is under way, and what it uses is not known, so everything "
            f"is kept. Wait until the run has ended, or delete {folder} if there is none."
        )

    def _lives(self, lock: Lock) -> bool:
        try:
            return lock.holder_lives(self.patience)
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
