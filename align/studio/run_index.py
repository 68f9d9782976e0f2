"""The list of a store's runs with the states of their stages, read again and again at little cost.

``align status`` has the same states. A finished stage is read once: while its record is the same file, its state is
taken from memory. Reading the records of a large store for the first time is spread over several lists: until a record
has been read, its stage counts as done, without a date. A separate thread asks Slurm, whose controller may need a
minute to answer.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.runs.run_page import RunOutline, stored_outline
from align.runs.status import LiveJobs, StageStatus, live_jobs, stage_status
from align.store.leases import RUNS, DamagedRun, read_run
from align.store.record import RECORD
from align.store.store import Store

SECONDS_BETWEEN_JOBS = 15.0
"""Time between two questions to Slurm."""
SECONDS_FOR_RECORDS = 0.2
"""Time in which one list reads records that it has not seen."""
SECONDS_FRESH = 0.5
"""Age up to which a list serves several readers."""
Signature = tuple[int, int, int]
"""Change time, size and inode of a file."""


@dataclass(frozen=True)
class IndexedRun:
    """A run as the store's record describes it."""

    outline: RunOutline
    when: float
    title: str


@dataclass
class RunList:
    """The runs of a store at one time; ``states`` has the stages' states by run."""

    runs: dict[str, IndexedRun]
    states: dict[str, list[StageStatus]]
    damaged: list[str]
    slurm_error: str = ""


@dataclass
class RunIndex:
    """The runs of a store. Several threads may read it."""

    store: Store
    _runs: dict[str, tuple[Signature, IndexedRun | str]] = field(default_factory=dict)
    """Name → signature of the record, and the run, or what is wrong with its record."""
    _done: dict[tuple[str, str], tuple[Signature, StageStatus]] = field(default_factory=dict)
    """(kind, key) of a finished stage → signature of its record, and its state."""
    _jobs: LiveJobs = field(default_factory=dict)
    _slurm_error: str = ""
    _jobs_read: float = float("-inf")
    _list: RunList | None = None
    _list_read: float = float("-inf")
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _job_lock: threading.Lock = field(default_factory=threading.Lock)
    _deadline: float = 0.0
    """Monotonic time after which the present list reads no further records."""

    def read(self) -> RunList:
        """Return the runs and the states of their stages; at most ``SECONDS_FRESH`` old."""
        with self._lock:
            now = time.monotonic()
            if self._list is None or now - self._list_read > SECONDS_FRESH:
                self._list = self._read()
                self._list_read = time.monotonic()
            return self._list

    def find(self, name: str) -> tuple[IndexedRun, list[StageStatus]] | None:
        """Return a run and the states of its stages; None if the store has no intact run of this name.

        Only what belongs to the run is read, and all of it.
        """
        with self._lock:
            if self._list is None:
                # Slurm is asked about all runs at once, so all are known before the first question.
                self._refresh_runs()
            self._refresh_run(self.store.root / RUNS / f"{name}.json")
            _, run = self._runs.get(name, (None, ""))
            if isinstance(run, str):
                return None
            self._refresh_jobs(self._intact_runs())
            self._deadline = float("inf")
            return run, [self._state(run.outline, stage, self._jobs) for stage in run.outline.stages]

    def forget(self) -> None:
        """Read the store again at the next call, as after a stop."""
        with self._lock:
            self._list = None

    def _read(self) -> RunList:
        self._refresh_runs()
        runs = self._intact_runs()
        damaged = [entry for _, entry in self._runs.values() if isinstance(entry, str)]
        self._refresh_jobs(runs)
        jobs = self._jobs
        self._deadline = time.monotonic() + SECONDS_FOR_RECORDS
        states = {
            name: [self._state(run.outline, stage, jobs) for stage in run.outline.stages] for name, run in runs.items()
        }
        used = {link for run in runs.values() for link in run.outline.stages.values()}
        for link in self._done.keys() - used:
            del self._done[link]
        return RunList(runs, states, damaged, self._slurm_error)

    def _intact_runs(self) -> dict[str, IndexedRun]:
        return {name: entry for name, (_, entry) in self._runs.items() if isinstance(entry, IndexedRun)}

    def _refresh_runs(self) -> None:
        """Read the records that are new or have changed, and forget those that are gone."""
        paths = {path.stem: path for path in (self.store.root / RUNS).glob("*.json")}
        for name in self._runs.keys() - paths.keys():
            del self._runs[name]
        for _, path in sorted(paths.items()):
            self._refresh_run(path)

    def _refresh_run(self, path: Path) -> None:
        """Read the record of a run if it is new or has changed; forget a run without a record."""
        name = path.stem
        signature = file_signature(path)
        if signature is None:
            self._runs.pop(name, None)
            return
        if name in self._runs and self._runs[name][0] == signature:
            return
        try:
            entry = read_run(path)
            outline = stored_outline(name, entry)
            self._runs[name] = signature, IndexedRun(outline, float(entry["when"]), outline.title)
        except DamagedRun as error:
            self._runs[name] = signature, str(error)
        except FileNotFoundError:
            self._runs.pop(name, None)

    def _state(self, outline: RunOutline, stage: str, jobs: LiveJobs) -> StageStatus:
        """Return the state of a stage, from memory if it is finished and its record is the same."""
        kind, key = outline.stages[stage]
        has_job = (outline.name, stage) in jobs
        signature = None if has_job else file_signature(self.store.folder(kind, key) / RECORD)
        if signature is not None:
            known_signature, status = self._done.get((kind, key), (None, None))
            if status is not None and known_signature == signature:
                return StageStatus(stage, status.state, status.detail)
            if time.monotonic() > self._deadline:
                return StageStatus(stage, "done")
        status = stage_status(outline, stage, self.store, jobs)
        if signature is not None and status.state == "done":
            self._done[kind, key] = signature, status
        return status

    def _refresh_jobs(self, runs: Mapping[str, IndexedRun]) -> None:
        """Ask Slurm in a thread if the last answer is old; a store without submissions is not asked about."""
        if time.monotonic() - self._jobs_read < SECONDS_BETWEEN_JOBS or not self._job_lock.acquire(blocking=False):
            return
        outlines = [run.outline for run in runs.values()]

        def ask() -> None:
            try:
                self._jobs, self._slurm_error = live_jobs(self.store, outlines)
            finally:
                self._jobs_read = time.monotonic()
                self._job_lock.release()

        threading.Thread(target=ask, name="slurm", daemon=True).start()


def file_signature(path: Path) -> Signature | None:
    """Return what changes when a file is written again; None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def list_json(runs: RunList, pages: Mapping[str, str]) -> dict[str, Any]:
    """Return the list for the browser, the run that started last first. ``pages`` has the address of each page."""
    rows = []
    for name, run in sorted(runs.runs.items(), key=lambda item: -item[1].when):
        states = runs.states[name]
        rows.append(
            {
                "name": name,
                "title": run.title,
                "when": run.when,
                "counts": dict(Counter(status.state for status in states)),
                "stages": [status.to_json() for status in states],
                "page": pages.get(name, ""),
            }
        )
    return {"runs": rows, "damaged": runs.damaged, "slurm_error": runs.slurm_error}
