"""A run on Ray: a run's stages as tasks of a cluster, followed until they are over."""

from __future__ import annotations

import functools
import sys

from align.cli.parser import print_warning
from align.cli.run_session import print_outcome, report_on
from align.clusters.ray.run import GOES_ON, run_tasks
from align.inference import ray_client
from align.pipeline.pipeline import Pipeline
from align.runner.prepare import RunOptions, prepare_run


def run_on_ray(pipeline: Pipeline, options: RunOptions, *, json: bool) -> int:
    """Start tasks for the unfinished stages and follow them; returns the exit code. The tasks end with this command."""
    ready = prepare_run(pipeline, options)
    for message in ready.warnings:
        print_warning(message)
    ray_client.require_ray()
    try:
        outcome = report_on(functools.partial(run_tasks, pipeline, ready), pipeline, quiet=json, store=ready.store)
    except KeyboardInterrupt:
        print(f"\nStopped. {GOES_ON}", file=sys.stderr)
        raise
    return print_outcome(pipeline, outcome, json)
