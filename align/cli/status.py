"""``align status`` and ``align cancel``: the stages of a run, here and on a cluster. Has no heavy imports."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from align.cli.parser import Handler, add_store, print_json
from align.config.validation import suggest
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.runs.status import StageStatus
    from align.store.store import Store

NOTABLE = ("runs", "waits", "failed", "stopped", "damaged")
"""States of stages that the index of all runs explains."""


def run(options: argparse.Namespace) -> int:
    """Run ``align status``."""
    from align.cli.artifacts import print_damage
    from align.runs.run_page import find_run, open_store_of, stored_outline
    from align.runs.status import live_jobs, stage_status

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
        name: [stage_status(outline, stage, store, jobs) for stage in outline.stages] for name, outline in runs.items()
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
    from align.report.page.templates import IndexedRun, write_index
    from align.runs.run_page import PAGE
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
    from align.runs.run_page import find_run, open_store_of
    from align.runs.status import cancel_run
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
    cancelled = cancel_run(store, name, outline, options.stages)
    if options.json:
        print_json({"run": name, "jobs": cancelled.jobs, "processes": cancelled.processes})
    elif cancelled.jobs or cancelled.processes:
        ended = [f"job {job}" for job in cancelled.jobs] + [f"process {process}" for process in cancelled.processes]
        print(f"ended {', '.join(ended)}; finished stages and checkpoints are kept")
    else:
        print(f"'{name}' has nothing that waits or runs")
    return 0


def add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align cancel``."""
    parser.add_argument("run", metavar="RUN", help="a run's or sweep's name, or its pipeline file")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="end only the jobs of these stages")
    add_store(parser)


CANCEL = Handler(run_cancel, add_cancel_arguments)
