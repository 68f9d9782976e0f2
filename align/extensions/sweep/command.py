"""``align sweep``: try a search space over a pipeline's fields. Imports no heavy library."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_executor, add_store, print_json, print_warning
from align.cli.report import add_output, output_folder, show_page
from align.errors import UserError

if TYPE_CHECKING:
    from align.extensions.sweep.plan import Sweep
    from align.extensions.sweep.study import Study
    from align.store.store import Store

FAILED = 1
PAGE = "compare.html"
MAX_COMPARED = 16
"""Trials that are compared in full; beyond it lines and boxes could not be told apart."""


def run(options: argparse.Namespace) -> int:
    """Run ``align sweep``."""
    from align.config.shipped import find_shipped
    from align.extensions.sweep.config import load_sweep
    from align.extensions.sweep.plan import Sweep
    from align.extensions.sweep.study import Study
    from align.extensions.sweep.table import print_plan, print_trials
    from align.runner.open_store import open_store

    folder = output_folder(options.output)
    options.sweep = find_shipped(options.sweep, "sweep")
    config = load_sweep(options.sweep)
    if options.trials is not None:
        config = config.model_copy(update={"trials": _check_positive("--trials", options.trials)})
    sweep = Sweep.check(config, options.sweep, options.assignments, options.on, print_warning)
    executor = sweep.base.config.runtime.executor.name
    store = open_store(sweep.base, options.store)
    if options.dry_run:
        print_plan(sweep, store, options.json)
        return 0
    store.require_writable()
    if options.detach and executor != "slurm":
        raise UserError("--detach leaves a sweep to a scheduler that outlives this command: add --on slurm.")
    workers = _check_positive("--workers", config.workers if options.workers is None else options.workers)
    study = Study.open(store, sweep, fresh=options.fresh)
    if options.retry:
        print(f"{study.retry()} failed trials run again", file=sys.stderr)
    try:
        if _run_trials(options, sweep, study, store, workers):
            return 0
    except KeyboardInterrupt:
        if executor != "slurm":
            print("\nStopped; finished trials and stages are kept. The same command continues.", file=sys.stderr)
        raise
    finally:
        page = _try_page(sweep, study, store, folder)
    if options.json:
        print_json(_document(sweep, study, store, page))
    else:
        print_trials(sweep, study)
        if page is not None:
            show_page(page, options.open)
    return 0 if study.best() else FAILED


def _check_positive(option: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{option}: should be at least 1; found {value}.")
    return value


def _run_trials(options: argparse.Namespace, sweep: Sweep, study: Study, store: Store, workers: int) -> bool:
    """Run the trials here or on a cluster; returns True if they are left to the cluster."""
    from align.extensions.sweep.worker_pool import ProcessWorkers, SweepTask, run_trials, run_workers

    executor = sweep.base.config.runtime.executor.name
    if executor == "slurm":
        from align.extensions.sweep.on_cluster import SlurmWorkers

        jobs = SlurmWorkers.start(sweep, store, workers, options)
        if not options.detach:
            run_workers(jobs, sweep, study, quiet=options.json)
        elif options.json:
            print_json({"name": sweep.config.name, "store": str(store.root), "job": jobs.job})
        return bool(options.detach)
    if executor == "ray":
        from align.clusters.follow import executor_settings
        from align.config.runtime.executor import RayExecutor
        from align.extensions.sweep.on_cluster import RayWorkers
        from align.inference import ray_client

        ray_client.require_ray()
        with ray_client.connected(executor_settings(sweep.base, RayExecutor).address) as ray:
            run_workers(RayWorkers(ray, sweep, store, workers, options), sweep, study, quiet=options.json)
    elif workers == 1:
        run_trials(sweep, study, store, quiet=options.json, shows_stages=not options.json)
    else:
        run_workers(ProcessWorkers(SweepTask.of(sweep, store, options), workers), sweep, study, quiet=options.json)
    return False


# ---- outcome --------------------------------------------------------------------------------------------------------


def _try_page(sweep: Sweep, study: Study, store: Store, folder: Path | None) -> Path | None:
    """Write the page. An error is printed on standard error and has no other effect."""
    try:
        return _write_page(sweep, study, store, folder)
    except Exception as error:  # whatever it is: the sweep's own outcome must reach the user
        from align.errors import printable

        print(printable(f"note: the page could not be written: {type(error).__name__}: {error}"), file=sys.stderr)
        return None


def _write_page(sweep: Sweep, study: Study, store: Store, folder: Path | None) -> Path | None:
    """Write the page: the trials in a table, and the best of them compared like any runs. None without a done trial."""
    from align.extensions.sweep.table import sentences, short_name, trial_rows
    from align.report.compare.comparison import write_comparison
    from align.report.compare.run_table import SweepTrials
    from align.runs.run_page import damaged_stages, finished_artifacts, stored_outline
    from align.store.store import REPORTS

    rows = trial_rows(sweep, study)
    stored_runs = store.runs()
    done_rows = [row for row in rows if row.state == "done"]
    compared = [row for row in done_rows if row.run in stored_runs][:MAX_COMPARED]
    runs = {row.run: finished_artifacts(stored_outline(row.run, stored_runs[row.run]), store) for row in compared}
    runs = {name: artifacts for name, artifacts in runs.items() if artifacts}
    if not runs:
        return None
    text = sentences(sweep, rows)
    if len(compared) < sum(row.state == "done" for row in rows):
        text.append(f"Below, the first {len(compared)} of this table are compared in full.")
    table = []
    for row in rows:
        draw = {short_name(name): value for name, value in row.draw.items()}
        table.append({**asdict(row), "draw": draw})
    trials = SweepTrials([short_name(dimension.name) for dimension in sweep.space], _objectives(sweep), table, text)
    notes = {row.run: row.note for row in compared if row.note}
    for name in runs:
        for stage, damage in damaged_stages(stored_outline(name, stored_runs[name]), store).items():
            notes[name] = " ".join(filter(None, [notes.get(name), f"{stage} is left out: {damage}"]))
    out = (folder or store.root / REPORTS / sweep.config.name) / PAGE
    return write_comparison(runs, out, title=sweep.config.name, notes=notes, sweep=trials)


def _objectives(sweep: Sweep) -> list[dict[str, str]]:
    return [
        {"name": objective.name, "better": "higher" if objective.higher else "lower"} for objective in sweep.objectives
    ]


def _document(sweep: Sweep, study: Study, store: Store, page: Path | None) -> dict[str, Any]:
    """Return the sweep as one JSON document."""
    from align.extensions.sweep.table import trial_rows

    return {
        "name": sweep.config.name,
        "store": str(store.root),
        "objectives": _objectives(sweep),
        "best": study.best(),
        "trials": [vars(row) for row in trial_rows(sweep, study)],
        "page": None if page is None else str(page.resolve()),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align sweep``."""
    parser.add_argument("sweep", metavar="SWEEP", help="a sweep's file, or the name of a shipped one: dpo")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be tried")
    parser.add_argument("--workers", type=int, metavar="N", help="trials at once, each a process")
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all, instead of the file's")
    parser.add_argument("--retry", action="store_true", help="run failed trials again, too")
    parser.add_argument("--fresh", action="store_true", help="start over; finished stages are kept")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="assignments",
        help="override a field of the pipeline in every trial; may be given several times",
    )
    add_executor(parser, "trials")
    parser.add_argument("--detach", action="store_true", help="hand the trials to the cluster and come back")
    add_output(parser)
    add_store(parser)
