"""A run as Ray tasks, from the first to the last. Never imports torch."""

from __future__ import annotations

import secrets
import signal
import time
from pathlib import Path

from align.clusters.follow import JobFollower
from align.clusters.ray.tasks import RayQueue, ray_block
from align.errors import StageFailed
from align.inference import ray_client
from align.pipeline.pipeline import Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.listener import Listener
from align.runner.prepare import Prepared
from align.runner.runner import Run
from align.store.store import JOBS, Store

GOES_ON = "Finished stages and checkpoints are kept. The same command continues."


def run_tasks(pipeline: Pipeline, ready: Prepared, listener: Listener) -> Run:
    """Start a task for each stage that is to be made, and report them to ``listener`` until all are over.

    The tasks end with this process. Raises ``StageFailed``, and ``Stopped`` once USR1 has asked them to stop.
    """
    store = ready.store
    with (
        StopRequest().handle_signals(signal.SIGUSR1) as stop,
        ray_client.connected(ray_block(pipeline).address) as ray,
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


def _note_folder(store: Store, run: str) -> Path:
    """Create the folder for the notes of this run's tasks."""
    folder = store.root / JOBS / run / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder


__all__ = ["GOES_ON", "run_tasks"]
