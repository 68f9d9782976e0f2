"""``align run --on ray``: a run's stages as tasks of a Ray cluster, followed until they are over."""

from __future__ import annotations

import secrets
import signal
import sys
import time
from pathlib import Path

from align.cli.console import printable
from align.cli.run import report_on, say_outcome
from align.clusters.follow import Following
from align.clusters.ray.tasks import RayQueue
from align.errors import StageFailed
from align.inference import ray_client as client
from align.pipeline.pipeline import Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.listener import Listener
from align.runner.prepare import RunOptions, prepare_run
from align.runner.runner import Run
from align.store.store import JOBS, Store

GOES_ON = "Finished stages and checkpoints are kept. The same command continues."


def run_on_ray(pipeline: Pipeline, options: RunOptions, *, json: bool) -> int:
    """Start what is to be made as tasks and follow it; the exit code. The tasks end with this command."""
    ready = prepare_run(pipeline, options)
    opened = ready.store
    for message in ready.warnings:
        print(f"! {printable(message)}", file=sys.stderr)
    client.require_ray()

    def run(listener: Listener) -> Run:
        with (
            StopRequest().handle_signals(signal.SIGUSR1) as stop,
            client.connected(pipeline.config.runtime.ray.address) as ray,
            opened.use(pipeline.name, pipeline.references, pipeline.plain),
        ):
            queue = RayQueue(ray, pipeline, opened, _folder(opened, pipeline.name), stop=stop)
            queue.start(ready.wanted, ready.anew)
            try:
                return Following(pipeline, opened, [node.name for node in ready.wanted], queue, listener).follow()
            except StageFailed as error:
                if stop.is_requested:
                    raise Stopped(f"stopped as asked. {GOES_ON}") from error
                raise
            except BaseException:
                client.call_off(ray, list(queue.references.values()))
                raise

    try:
        outcome = report_on(run, pipeline, quiet=json, store=opened)
    except KeyboardInterrupt:
        print(f"\nStopped. {GOES_ON}", file=sys.stderr)
        raise
    return say_outcome(pipeline, outcome, json)


def _folder(store: Store, run: str) -> Path:
    """Where the tasks of this run say how they are."""
    folder = store.root / JOBS / run / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder
