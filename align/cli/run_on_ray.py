"""``align run --on ray``: a run's stages as tasks of a Ray cluster, followed until they are over."""

from __future__ import annotations

import secrets
import signal
import sys
import time
from pathlib import Path

from align.cli.console import printable
from align.cli.run_session import print_outcome, report_on
from align.clusters.follow import JobFollower
from align.clusters.ray.tasks import RayQueue
from align.errors import StageFailed
from align.inference import ray_client
from align.pipeline.pipeline import Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.listener import Listener
from align.runner.prepare import RunOptions, prepare_run
from align.runner.runner import Run
from align.store.store import JOBS, Store

GOES_ON = "Finished stages and checkpoints are kept. The same command continues."


def run_on_ray(pipeline: Pipeline, options: RunOptions, *, json: bool) -> int:
    """Start tasks for the unfinished stages and follow them; returns the exit code. The tasks end with this command."""
    ready = prepare_run(pipeline, options)
    store = ready.store
    for message in ready.warnings:
        print(f"! {printable(message)}", file=sys.stderr)
    ray_client.require_ray()

    def follow(listener: Listener) -> Run:
        with (
            StopRequest().handle_signals(signal.SIGUSR1) as stop,
            ray_client.connected(pipeline.config.runtime.ray.address) as ray,
            store.use(pipeline.name, pipeline.references, pipeline.plain),
        ):
            queue = RayQueue(ray, pipeline, store, _note_folder(store, pipeline.name), stop=stop)
            # All tasks at once: each waits for its inputs, and Ray places them as resources become free.
            queue.start(ready.wanted, ready.force)
            stages = [node.name for node in ready.wanted]
            try:
                return JobFollower(pipeline, store, stages, queue, listener).follow()
            except StageFailed as error:
                if stop.is_requested:
                    raise Stopped(f"stopped as asked. {GOES_ON}") from error
                raise
            except BaseException:
                # Tasks would otherwise work on without anyone who follows them.
                ray_client.cancel(ray, list(queue.references.values()))
                raise

    try:
        outcome = report_on(follow, pipeline, quiet=json, store=store)
    except KeyboardInterrupt:
        print(f"\nStopped. {GOES_ON}", file=sys.stderr)
        raise
    return print_outcome(pipeline, outcome, json)


def _note_folder(store: Store, run: str) -> Path:
    """Create the folder for the notes of this run's tasks."""
    folder = store.root / JOBS / run / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder
