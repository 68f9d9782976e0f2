"""States of a run's stages, here and on a cluster, and the end of a run on request. Has no heavy imports."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.clusters import slurm_commands
from align.clusters.follow import SchedulerError
from align.clusters.slurm_commands import Job
from align.clusters.slurm_submission import StageJob, submissions
from align.clusters.slurm_submit import cancel_jobs
from align.errors import StageFailed, plain_number
from align.runner.listener import silence
from align.runner.stage_result import left_result
from align.runs.run_page import RunOutline
from align.store.artifacts import CHECKPOINTS, EVENTS
from align.store.json_files import parse_event, read_tail
from align.store.locks import is_of_this_machine
from align.store.record import DamagedRecord
from align.store.store import Store

LiveJobs = dict[tuple[str, str], tuple[StageJob, Job]]
"""(run, stage) → the submitted job and its state."""
TAIL_BYTES = 65536
"""Bytes at the end of an event file that are searched for the last progress."""


@dataclass(frozen=True)
class StageStatus:
    """State of a stage: ``done``, ``runs``, ``waits``, ``failed``, ``stopped``, ``damaged`` or ``not begun``."""

    stage: str
    state: str
    detail: str = ""
    job: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the status as the JSON output has it."""
        return {"stage": self.stage, "state": self.state, "what": self.detail, "job": self.job}


def live_jobs(store: Store, runs: Iterable[RunOutline]) -> tuple[LiveJobs, str]:
    """Return the live job of each (run, stage) that has one.

    The second value is the error if Slurm does not answer, in which case the jobs are not known.
    """
    # A submission may be older than the pipeline: only jobs with the stage's present key count.
    keys = {(outline.name, stage): key for outline in runs for stage, (_, key) in outline.stages.items()}
    submitted = [
        (submission.run, job)
        for submission in submissions(store)
        for job in submission.stages
        if keys.get((submission.run, job.stage)) == job.key
    ]
    try:
        states = slurm_commands.jobs({job.job for _, job in submitted})
    except SchedulerError as error:
        return {}, str(error)
    live: LiveJobs = {}
    for run_name, job in submitted:
        if job.job in states and states[job.job].is_live:
            live.setdefault((run_name, job.stage), (job, states[job.job]))
    return live, ""


def stage_status(outline: RunOutline, stage: str, store: Store, jobs: LiveJobs) -> StageStatus:
    """Return the state of a stage; a live job counts first, then the artifact, a local process, what was left."""
    kind, key = outline.stages[stage]
    partial = store.partial(kind, key)
    damage = ""
    try:
        artifact = store.find(kind, key, stage)
    except DamagedRecord as error:
        artifact = None
        damage = str(error)
    live_job = jobs.get((outline.name, stage))
    # A job that reruns a finished stage is live although the stage has an artifact.
    if live_job is not None and (artifact is None or live_job[0].force):
        job = live_job[1]
        if job.waits:
            reason = f" ({job.reason})" if job.reason else ""
            return StageStatus(stage, "waits", f"job {job.number}{reason}", job.number)
        detail = _join_parts(f"job {job.number} on {job.nodes}", _activity(partial))
        return StageStatus(stage, "runs", detail, job.number)
    if artifact is not None:
        return StageStatus(stage, "done", str(artifact.record["created"])[:16].replace("T", " "))
    if store.is_locked(kind, key):
        holder = store.holder_of(kind, key) or {}
        process = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else ""
        return StageStatus(stage, "runs", _join_parts(process, _activity(partial)))
    if damage:
        return StageStatus(stage, "damaged", damage)
    if partial.is_dir():
        return _left_behind(stage, partial)
    return StageStatus(stage, "not begun")


def _left_behind(stage: str, partial: Path) -> StageStatus:
    """Return the state of a stage that was begun and is not running."""
    # What the next run would do with the stage, which is what the reader wants to know.
    has_checkpoint = any((partial / CHECKPOINTS).glob("*"))
    next_start = "resumes from its checkpoint" if has_checkpoint else "starts over"
    result = left_result(partial)
    if result is not None and result.status in ("failed", "refused"):
        return StageStatus(stage, "failed", result.message)
    return StageStatus(stage, "stopped", _join_parts(last_progress(partial), next_start))


def last_progress(partial: Path) -> str:
    """Return the last progress in a stage's event file: ``12/40 steps``."""
    for event in _last_events(partial):
        if event["event"] == "progress":
            return f"{plain_number(event['done'])}/{plain_number(event['total'])} {event.get('unit', '')}".strip()
    return ""


def _activity(partial: Path) -> str:
    """Return the last progress of a running stage, and for how long it has been silent."""
    last = next(_last_events(partial), None)
    return _join_parts(last_progress(partial), "" if last is None else silence(time.time() - last["time"]))


def _last_events(partial: Path) -> Iterator[dict[str, Any]]:
    """Yield a stage's last events, newest first."""
    try:
        # The last progress is near the end: files of long runs have megabytes of events before it.
        lines = read_tail(partial / EVENTS, TAIL_BYTES).splitlines()
    except OSError:
        return
    yield from (event for event in map(parse_event, reversed(lines)) if event is not None)


def _join_parts(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Cancelled:
    """Work that was asked to end: numbers of cluster jobs and ids of processes of this machine."""

    jobs: list[int]
    processes: list[int]


def cancel_run(store: Store, name: str, outline: RunOutline | None, stages: Collection[str] = ()) -> Cancelled:
    """End the jobs and the local process of a run; finished stages and checkpoints are kept.

    Args:
        outline: The run's stages; None for a sweep, which has only jobs.
        stages: Names of the stages to end; empty means all.

    Raises:
        StageFailed: if Slurm does not answer.
    """
    try:
        jobs = cancel_jobs(submissions(store, name), set(stages) or None)
    except SchedulerError as error:
        raise StageFailed(
            f"Slurm does not answer ({error}); its jobs may still run. Run the same command again."
        ) from None
    processes = [] if outline is None else stop_processes(outline, store, stages)
    return Cancelled(jobs, processes)


def stop_processes(outline: RunOutline, store: Store, stages: Collection[str]) -> list[int]:
    """Send SIGTERM to the processes of this machine that hold locks of the run's stages; return their ids.

    A run ends on SIGTERM as on Ctrl-C. ``stages`` restricts this to some stages; empty means all.
    """
    holders: set[int] = set()
    for stage, (kind, key) in outline.stages.items():
        if (stages and stage not in stages) or not store.is_locked(kind, key):
            continue
        holder = store.holder_of(kind, key)
        # Not the host's name: containers and machines on a shared store may have the same.
        if holder is not None and is_of_this_machine(holder):
            holders.add(int(holder["pid"]))
    ended = []
    # This process may hold a lock itself while it looks.
    for process in holders - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGTERM)
            ended.append(process)
    return sorted(ended)
