"""``align cancel``: end a run's jobs on a cluster and its process on this machine. Has no heavy imports."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from align.cli.parser import add_store, print_json
from align.config.validation import suggest
from align.errors import StageFailed, UserError

if TYPE_CHECKING:
    from align.cli.run_page import RunOutline
    from align.store.store import Store


def run(options: argparse.Namespace) -> int:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align cancel``."""
    parser.add_argument("run", metavar="RUN", help="a run's or sweep's name, or its pipeline file")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="end only the jobs of these stages")
    add_store(parser)
