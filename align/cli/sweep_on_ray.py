"""A sweep on Ray: the sweep's workers as tasks of a Ray cluster, which share the study through the store."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align.cli.sweep_table import print_changes
from align.cli.sweep_worker import run_trials
from align.clusters.ray.tasks import ray_block
from align.clusters.threads import with_threads
from align.config.validation import validate_plain
from align.errors import StageFailed, UserError
from align.inference import ray_client
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
    block = ray_block(sweep.base)
    task = {
        "config": sweep.config.model_dump(mode="json", exclude_unset=True),
        "where": sweep.where,
        "assignments": list(options.assignments),
        "on": options.on,
        "store": asdict(Opening.of(store)),
        "base": str(Path.cwd()),
        "cores": max(1, int(block.cpus)),
    }
    ray_client.require_ray()
    with StopRequest().handle_signals(signal.SIGUSR1) as stop, ray_client.connected(block.address) as ray:
        if not ray_client.could_hold(ray, block):
            raise UserError(
                f"{sweep.base.where}: runtime.executor: no node of the Ray cluster has what a worker asks for "
                f"({ray_client.describe_resources(block)})."
            )
        references = []
        for number in range(workers):
            name = f"align:{sweep.config.name}:{number}"
            references.append(ray_client.start(ray, run_worker_task, block, name, [task]))
        try:
            errors = list(_follow(ray, references, sweep, study, stop, quiet=options.json))
        except BaseException:
            ray_client.cancel(ray, references)
            raise
    if stop.is_requested:
        raise Stopped("stopped as asked; finished trials and stages are kept. The same command continues.")
    errors = [text for text in errors if text]
    if errors:
        raise StageFailed(f"{len(errors)} of {workers} workers failed: {errors[0]}")


def _follow(
    ray: Any, references: list[Any], sweep: Sweep, study: Study, stop: StopRequest, *, quiet: bool
) -> Iterator[str]:
    """Print trials that begin or end, until all workers have ended; yield each worker's error, empty for none."""
    states = {trial.number: trial.state for trial in study.trials()}
    running = list(references)
    while True:
        print_changes(sweep, study, states, quiet)
        for reference in list(running):
            outcome = ray_client.outcome(ray, reference)
            if outcome.is_over:
                running.remove(reference)
                yield outcome.error or str(outcome.result or "")
        if not running:
            return
        if stop.is_requested:  # interrupted trials continue later, where their stages left off
            ray_client.cancel(ray, running)
        time.sleep(POLL_SECONDS)


def run_worker_task(task: dict[str, Any]) -> str:
    """Run trials until none is left, as a Ray task; returns the error that ended it too early, or an empty string."""
    opening = Opening(**task["store"])
    if not (Path(opening.folder) / MARKER).is_file():
        host = socket.gethostname()
        return f"node {host} does not see the store {opening.folder}; all nodes must, under the same path"
    os.chdir(task["base"])
    try:
        config = validate_plain(SweepConfig, task["config"])
        sweep = Sweep.check(config, task["where"], task["assignments"], task["on"])
        sweep = replace(sweep, base=with_threads(sweep.base, task["cores"]))
        store = opening.open()
        study = Study.open(store, sweep)
        run_trials(sweep, study, store, quiet=True, shows_stages=False, stop=StopRequest())
    except (UserError, StageFailed) as error:
        return str(error)
    return ""
