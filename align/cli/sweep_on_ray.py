"""``align sweep --on ray``: the sweep's workers as tasks of a Ray cluster, which share the study through the store."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align.cli.sweep import work_here
from align.cli.sweep_table import say_changes
from align.clusters.threads import with_threads
from align.config.validation import validate_plain
from align.errors import StageFailed, UserError
from align.inference import ray_client as client
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.open_store import Opening
from align.store.marker import MARKER
from align.store.store import Store
from align.sweep.config import SweepConfig
from align.sweep.plan import Sweep
from align.sweep.study import Study

POLL_SECONDS = 1.0


def sweep_on_ray(sweep: Sweep, study: Study, store: Store, workers: int, options: argparse.Namespace) -> None:
    """Run ``workers`` tasks until no trial is left; they end with this command. Raises what ended one too early."""
    block = sweep.base.config.runtime.ray
    given = {
        "config": sweep.config.model_dump(mode="json", exclude_unset=True),
        "where": sweep.where,
        "assignments": list(options.assignments),
        "store": asdict(Opening.of(store)),
        "base": str(Path.cwd()),
        "cores": max(1, int(block.cpus)),
    }
    client.require_ray()
    with StopRequest().handle_signals(signal.SIGUSR1) as stop, client.connected(block.address) as ray:
        if not client.could_hold(ray, block):
            needs = ", ".join(f"{name} {amount:g}" for name, amount in client.wanted(block).items())
            raise UserError(
                f"{sweep.base.where}: runtime.ray: no node of the Ray cluster has what a worker asks for ({needs})."
            )
        tasks = [
            client.start(ray, work_elsewhere, block, f"align:{sweep.config.name}:{at}", [given])
            for at in range(workers)
        ]
        try:
            said = list(_follow(ray, tasks, sweep, study, stop, options.json))
        except BaseException:
            client.call_off(ray, tasks)
            raise
    if stop.is_requested:
        raise Stopped("stopped as asked; finished trials and stages are kept. The same command continues.")
    bad = [text for text in said if text]
    if bad:
        raise StageFailed(f"{len(bad)} of {workers} workers ended before their time: {bad[0]}")


def _follow(ray: Any, tasks: list[Any], sweep: Sweep, study: Study, stop: StopRequest, quiet: bool) -> Iterable[str]:
    """What each worker came to, empty where all is well; tells of each trial that begins or ends."""
    states = {one.number: one.state for one in study.tried()}
    left = list(tasks)
    while True:
        say_changes(sweep, study, states, quiet)
        for task in list(left):
            over, returned, why = client.outcome(ray, task)
            if over:
                left.remove(task)
                yield why or str(returned or "")
        if not left:
            return
        if stop.is_requested:  # trials that are under way begin again where their stages left off
            client.call_off(ray, left)
        time.sleep(POLL_SECONDS)


def work_elsewhere(given: dict[str, Any]) -> str:
    """The task: trials until none is left; empty, or why it ended before."""
    opening = Opening(**given["store"])
    if not (Path(opening.folder) / MARKER).is_file():
        host = socket.gethostname()
        return f"node {host} does not see the store {opening.folder}; all nodes must, under the same path"
    os.chdir(given["base"])
    try:
        config = validate_plain(SweepConfig, given["config"])
        sweep = Sweep.check(config, given["where"], given["assignments"])
        sweep = replace(sweep, base=with_threads(sweep.base, given["cores"]))
        store = opening.open()
        study = Study.open(store, sweep)
        work_here(sweep, study, store, quiet=True, shown=False, stop=StopRequest())
    except (UserError, StageFailed) as error:
        return str(error)
    return ""
