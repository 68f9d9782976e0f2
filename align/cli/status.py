"""``align status``: what of a run is done, runs, waits, has failed; here and on a cluster. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from align.cli.parser import add_store, print_json
from align.store.events import parse_event
from align.store.record import DamagedRecord

if TYPE_CHECKING:
    from pathlib import Path

    from align.cli.run_page import RunOf
    from align.clusters.slurm.commands import Job
    from align.clusters.slurm.submission import StageJob
    from align.store.store import Store

LAST_BYTES = 65536
"""Of an event file, what is read to find the last progress."""


@dataclass(frozen=True)
class StageStatus:
    """How a stage is.

    ``state`` is ``done``, ``runs``, ``waits``, ``failed``, ``stopped``, ``damaged`` or ``not begun``; ``what`` says
    more.
    """

    stage: str
    state: str
    what: str = ""
    job: int | None = None


def run(options: argparse.Namespace) -> int:
    """say what of a run is done, runs, waits or has failed, here and on a cluster; without a name, of every run"""
    from align.cli.artifacts import say_damage
    from align.cli.run_page import find_run, remembered
    from align.runner.open_store import open_store

    store = open_store(None, options.store)
    if options.run is None:
        known, damaged = store.survey_runs()
        say_damage(damaged)
        runs = {name: remembered(name, found) for name, found in known.items()}
    else:
        one = find_run(options.run, store)
        runs = {one.name: one}
    jobs, silent = live_jobs(store, runs.values())
    found = {name: [_status(one, stage, store, jobs) for stage in one.stages] for name, one in runs.items()}
    if options.json:
        print_json({name: [asdict(stage) for stage in stages] for name, stages in found.items()})
        return 0
    if silent:
        print(f"! Slurm does not answer, so what its jobs do is not known: {silent}")
    if not found:
        print(f"{store.root}: no run has been made there yet")
    elif options.run is None:
        _print_runs(found)
    else:
        _print_stages(next(iter(found.values())))
    return 0


def live_jobs(store: Store, runs: Iterable[RunOf]) -> tuple[dict[tuple[str, str], tuple[StageJob, Job]], str]:
    """The live job of each (run, stage) that has one, and why that is not known, where Slurm does not answer."""
    from align.clusters.follow import NoAnswer
    from align.clusters.slurm import commands
    from align.clusters.slurm.submission import submissions

    keys = {(one.name, stage): key for one in runs for stage, (_, key) in one.stages.items()}
    known = [
        (place.run, job)
        for place in submissions(store)
        for job in place.stages
        if keys.get((place.run, job.stage)) == job.key
    ]
    try:
        states = commands.jobs({job.job for _, job in known})
    except NoAnswer as error:
        return {}, str(error)
    found: dict[tuple[str, str], tuple[StageJob, Job]] = {}
    for name, job in known:
        if job.job in states and states[job.job].is_live:
            found.setdefault((name, job.stage), (job, states[job.job]))
    return found, ""


def _status(run_: RunOf, stage: str, store: Store, jobs: dict[tuple[str, str], tuple[StageJob, Job]]) -> StageStatus:
    kind, key = run_.stages[stage]
    partial, damage = store.partial(kind, key), ""
    try:
        artifact = store.find(kind, key, stage)
    except DamagedRecord as error:
        artifact, damage = None, str(error)
    held = jobs.get((run_.name, stage))
    if held is not None and (artifact is None or held[0].anew):
        _, job = held
        if job.waits:
            return StageStatus(stage, "waits", f"job {job.number}{f' ({job.why})' if job.why else ''}", job.number)
        return StageStatus(stage, "runs", _joined(f"job {job.number} on {job.nodes}", _progress(partial)), job.number)
    if artifact is not None:
        return StageStatus(stage, "done", str(artifact.record["created"])[:16].replace("T", " "))
    if store.is_locked(kind, key):
        holder = store.holder_of(kind, key) or {}
        where = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else ""
        return StageStatus(stage, "runs", _joined(where, _progress(partial)))
    if damage:
        return StageStatus(stage, "damaged", damage)
    if partial.is_dir():
        return _left_behind(stage, partial)
    return StageStatus(stage, "not begun")


def _left_behind(stage: str, partial: Path) -> StageStatus:
    """A stage that was begun and is not being made."""
    from align.runner.stage_result import left_result
    from align.store.partial import CHECKPOINTS

    kept = "goes on from its checkpoint" if any((partial / CHECKPOINTS).glob("*")) else "starts anew"
    result = left_result(partial)
    if result is not None and result.status in ("failed", "refused"):
        return StageStatus(stage, "failed", result.message)
    return StageStatus(stage, "stopped", _joined(_progress(partial), kept))


def _progress(partial: Path) -> str:
    """The last progress in a stage's event file: ``12/40 steps``."""
    from align.store.partial import EVENTS

    try:
        with (partial / EVENTS).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        event = parse_event(line)
        if event is not None and event["event"] == "progress":
            return f"{event['done']:g}/{event['total']:g} {event.get('unit', '')}".strip()
    return ""


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _print_stages(stages: list[StageStatus]) -> None:
    from align.cli.console import printable

    width = max(len(one.stage) for one in stages)
    for one in stages:
        print(printable(f"{one.stage:<{width}}  {one.state:<9}  {one.what}").rstrip())


def _print_runs(found: dict[str, list[StageStatus]]) -> None:
    width = max(len(name) for name in found)
    for name, stages in found.items():
        counts = {state: sum(one.state == state for one in stages) for state in dict.fromkeys(s.state for s in stages)}
        print(f"{name:<{width}}  {', '.join(f'{count} {state}' for state, count in counts.items())}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``align status``."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name, or its pipeline file")
    add_store(parser)
