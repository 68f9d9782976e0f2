"""``align status`` and ``align cancel``: the stages of a run, here and on a cluster. Has no heavy imports."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_store, print_json
from align.config.validation import suggest
from align.errors import StageFailed, UserError, plain_number, printable
from align.store.json_files import parse_event
from align.store.record import DamagedRecord

if TYPE_CHECKING:
    from pathlib import Path

    from align.cli.run_page import RunOutline
    from align.clusters.slurm_commands import Job
    from align.clusters.slurm_submission import StageJob
    from align.store.store import Store

    LiveJobs = dict[tuple[str, str], tuple[StageJob, Job]]
    """(run, stage) → the submitted job and its state."""

NOTABLE = ("runs", "waits", "failed", "stopped", "damaged")
"""States of stages that the index of all runs explains."""
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


def run(options: argparse.Namespace) -> int:
    """Run ``align status``."""
    from align.cli.artifacts import print_damage
    from align.cli.run_page import find_run, open_store_of, stored_outline

    store = open_store_of([options.run], options.store)
    entries: dict[str, dict[str, Any]] = {}
    if options.run is None:
        entries, damaged = store.survey_runs()
        print_damage(damaged)
        runs = {name: stored_outline(name, entry) for name, entry in entries.items()}
    else:
        outline = find_run(options.run, store)
        runs = {outline.name: outline}
    jobs, slurm_error = live_jobs(store, runs.values())
    statuses = {
        name: [_status(outline, stage, store, jobs) for stage in outline.stages] for name, outline in runs.items()
    }
    if options.json:
        print_json({name: [status.to_json() for status in stages] for name, stages in statuses.items()})
        return 0
    if slurm_error:
        print(f"! Slurm does not answer, so the state of its jobs is not known: {slurm_error}")
    if not statuses:
        print(f"{store.root}: this store has no runs yet")
    elif options.run is None:
        _print_runs(statuses)
        _write_index(entries, statuses, store)
    else:
        _print_stages(next(iter(statuses.values())))
    return 0


def live_jobs(store: Store, runs: Iterable[RunOutline]) -> tuple[LiveJobs, str]:
    """Return the live job of each (run, stage) that has one.

    The second value is the error if Slurm does not answer, in which case the jobs are not known.
    """
    from align.clusters import slurm_commands
    from align.clusters.follow import SchedulerError
    from align.clusters.slurm_submission import submissions

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


def _status(outline: RunOutline, stage: str, store: Store, jobs: LiveJobs) -> StageStatus:
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
        detail = _join_parts(f"job {job.number} on {job.nodes}", _progress(partial))
        return StageStatus(stage, "runs", detail, job.number)
    if artifact is not None:
        return StageStatus(stage, "done", str(artifact.record["created"])[:16].replace("T", " "))
    if store.is_locked(kind, key):
        holder = store.holder_of(kind, key) or {}
        process = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else ""
        return StageStatus(stage, "runs", _join_parts(process, _progress(partial)))
    if damage:
        return StageStatus(stage, "damaged", damage)
    if partial.is_dir():
        return _left_behind(stage, partial)
    return StageStatus(stage, "not begun")


def _left_behind(stage: str, partial: Path) -> StageStatus:
    """Return the state of a stage that was begun and is not running."""
    from align.runner.stage_result import left_result
    from align.store.artifacts import CHECKPOINTS

    # What the next run would do with the stage, which is what the reader wants to know.
    has_checkpoint = any((partial / CHECKPOINTS).glob("*"))
    next_start = "resumes from its checkpoint" if has_checkpoint else "starts over"
    result = left_result(partial)
    if result is not None and result.status in ("failed", "refused"):
        return StageStatus(stage, "failed", result.message)
    return StageStatus(stage, "stopped", _join_parts(_progress(partial), next_start))


def _progress(partial: Path) -> str:
    """Return the last progress in a stage's event file: ``12/40 steps``."""
    from align.store.artifacts import EVENTS

    try:
        with (partial / EVENTS).open("rb") as file:
            # The last progress is near the end: files of long runs have megabytes of events before it.
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        event = parse_event(line)
        if event is not None and event["event"] == "progress":
            return f"{plain_number(event['done'])}/{plain_number(event['total'])} {event.get('unit', '')}".strip()
    return ""


def _join_parts(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _print_stages(stages: list[StageStatus]) -> None:

    width = max(len(status.stage) for status in stages)
    for status in stages:
        print(printable(f"{status.stage:<{width}}  {status.state:<9}  {status.detail}").rstrip())


def _print_runs(runs: dict[str, list[StageStatus]]) -> None:
    width = max(len(name) for name in runs)
    for name, stages in runs.items():
        print(f"{name:<{width}}  {_count_states(stages)}")


def _count_states(stages: list[StageStatus]) -> str:
    counts = Counter(status.state for status in stages)
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _write_index(
    entries: Mapping[str, Mapping[str, Any]], statuses: Mapping[str, list[StageStatus]], store: Store
) -> None:
    """Write the page with all runs and print its path; a store that is read-only gets none."""
    from align.cli.run_page import PAGE
    from align.report.page.templates import IndexedRun, write_index
    from align.store.store import REPORTS

    if not store.is_writable:
        return
    runs = []
    for name, stages in statuses.items():
        details = [f"{status.stage} {status.state}: {status.detail}" for status in stages if status.state in NOTABLE]
        runs.append(IndexedRun(name, float(entries[name].get("when", 0)), _count_states(stages), details))
    try:
        index = write_index(runs, store.root, store.root / REPORTS, PAGE)
    except OSError as error:
        print(f"note: the index of all runs could not be written: {error.strerror}", file=sys.stderr)
        return
    print(f"All runs: {printable(str(index.resolve()))}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align status``."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name, or its pipeline file")
    add_store(parser)


def run_cancel(options: argparse.Namespace) -> int:
    """Run ``align cancel``."""
    from align.cli.run_page import find_run, open_store_of
    from align.clusters.follow import SchedulerError
    from align.clusters.slurm_submission import submissions
    from align.clusters.slurm_submit import cancel_jobs
    from align.store.store import JOBS

    store = open_store_of([options.run], options.store)
    # A sweep on a cluster has separate jobs, but is not a run of the store.
    is_sweep = (store.root / JOBS / options.run).is_dir() and options.run not in store.runs()
    outline = None if is_sweep else find_run(options.run, store)
    name = options.run if outline is None else outline.name
    known_stages = {} if outline is None else outline.stages
    for stage in options.stages:
        if stage not in known_stages:
            raise UserError(f"{stage}: run '{name}' has no such stage.{suggest(stage, known_stages)}")
    try:
        jobs = cancel_jobs(submissions(store, name), set(options.stages) or None)
    except SchedulerError as error:
        raise StageFailed(
            f"Slurm does not answer ({error}); its jobs may still run. Run the same command again."
        ) from None
    processes = [] if outline is None else _stop_processes(outline, store, set(options.stages))
    if options.json:
        print_json({"run": name, "jobs": jobs, "processes": processes})
    elif jobs or processes:
        ended = [f"job {job}" for job in jobs] + [f"process {process}" for process in processes]
        print(f"ended {', '.join(ended)}; finished stages and checkpoints are kept")
    else:
        print(f"'{name}' has nothing that waits or runs")
    return 0


def _stop_processes(outline: RunOutline, store: Store, stages: set[str]) -> list[int]:
    """Send SIGTERM to the processes of this machine that hold locks of the run's stages; return their ids.

    A run ends on SIGTERM as on Ctrl-C. ``stages`` restricts this to some stages; empty means all.
    """
    from align.store.locks import is_of_this_machine

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


def add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align cancel``."""
    parser.add_argument("run", metavar="RUN", help="a run's or sweep's name, or its pipeline file")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="end only the jobs of these stages")
    add_store(parser)
