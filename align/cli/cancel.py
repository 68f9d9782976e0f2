"""``align cancel``: end what lives of a run, its jobs on a cluster and its process here. Imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING

from align.cli.parser import add_store, print_json
from align.config.validation import suggest
from align.errors import StageFailed, UserError

if TYPE_CHECKING:
    from align.cli.run_page import RunOf
    from align.store.store import Store


def run(options: argparse.Namespace) -> int:
    """end a run's jobs on a cluster, or its process here; finished stages and checkpoints are kept"""
    from align.cli.run_page import find_run
    from align.clusters.follow import NoAnswer
    from align.clusters.slurm.submission import submissions
    from align.clusters.slurm.submit import call_off
    from align.runner.open_store import open_store
    from align.store.store import JOBS

    store = open_store(None, options.store)
    if (store.root / JOBS / options.run).is_dir() and options.run not in store.runs():
        one, name = None, options.run  # a sweep
    else:
        one = find_run(options.run, store)
        name = one.name
    for stage in options.stages:
        if one is None or stage not in one.stages:
            raise UserError(f"{stage}: run '{name}' has no such stage.{suggest(stage, one.stages if one else [])}")
    try:
        jobs = call_off(submissions(store, name), set(options.stages) or None)
    except NoAnswer as error:
        raise StageFailed(f"Slurm does not answer ({error}); its jobs may go on. Run the same command again.") from None
    processes = [] if one is None else _stop_here(one, store, set(options.stages))
    if options.json:
        print_json({"run": name, "jobs": jobs, "processes": processes})
    elif jobs or processes:
        ended = [f"job {job}" for job in jobs] + [f"process {process}" for process in processes]
        print(f"ended {', '.join(ended)}; finished stages and checkpoints are kept")
    else:
        print(f"nothing of '{name}' waits or runs")
    return 0


def _stop_here(one: RunOf, store: Store, stages: set[str]) -> list[int]:
    """End, as Ctrl-C would, the processes of this machine that hold locks of the run's stages."""
    found: set[int] = set()
    for stage, (kind, key) in one.stages.items():
        if (stages and stage not in stages) or not store.is_locked(kind, key):
            continue
        holder = store.holder_of(kind, key)
        if holder is not None and holder.get("host") == socket.gethostname():
            found.add(int(holder["pid"]))
    ended = []
    for process in found - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGTERM)
            ended.append(process)
    return sorted(ended)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``align cancel``."""
    parser.add_argument("run", metavar="RUN", help="a run's or sweep's name, or its pipeline file")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="only the jobs of these stages")
    add_store(parser)
