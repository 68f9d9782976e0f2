"""A run on a cluster, followed until it is over: stages as jobs of Slurm or as tasks of Ray."""

from __future__ import annotations

import functools
import sys

from align.cli.parser import print_json, print_warning
from align.cli.run_session import print_outcome, report_on
from align.clusters.ray import CONTINUES, run_tasks
from align.clusters.slurm_submit import SubmittedRun, follow_jobs, submit_run
from align.inference import ray_client
from align.pipeline.pipeline import Pipeline
from align.runner.runner import RunOptions, prepare_run


def run_on_slurm(pipeline: Pipeline, options: RunOptions, *, detach: bool, json: bool) -> int:
    """Submit the unfinished stages, and follow them unless ``detach``; returns the exit code."""
    submitted = submit_run(pipeline, options)
    for message in submitted.warnings:
        print_warning(message)
    if detach:
        _print_jobs(submitted, json)
        return 0

    try:
        outcome = report_on(functools.partial(follow_jobs, submitted), pipeline, quiet=json, store=submitted.store)
    except KeyboardInterrupt:
        print(
            f"\nNo longer followed; its jobs go on. `align status {pipeline.name}` shows their state, the same command "
            f"follows them again, `align cancel {pipeline.name}` cancels them.",
            file=sys.stderr,
        )
        raise
    return print_outcome(pipeline, outcome, json)


def _print_jobs(submitted: SubmittedRun, json: bool) -> None:
    pipeline = submitted.pipeline
    jobs = {name: submitted.job(name) for name in submitted.submissions}
    if json:
        print_json({"name": pipeline.name, "store": str(submitted.store.root), "jobs": jobs, "new": submitted.new})
        return
    width = max((len(name) for name in jobs), default=0)
    for name, job in jobs.items():
        note = "" if name in submitted.new else ", submitted before"
        print(f"{name:<{width}}  job {job}{note}")
    if jobs:
        print(f"`align status {pipeline.name}` shows their state, `align cancel {pipeline.name}` cancels them.")
    else:
        print("Nothing to do: every stage is finished.")


def run_on_ray(pipeline: Pipeline, options: RunOptions, *, json: bool) -> int:
    """Start tasks for the unfinished stages and follow them; returns the exit code. The tasks end with this command."""
    ready = prepare_run(pipeline, options)
    for message in ready.warnings:
        print_warning(message)
    ray_client.require_ray()
    try:
        outcome = report_on(functools.partial(run_tasks, pipeline, ready), pipeline, quiet=json, store=ready.store)
    except KeyboardInterrupt:
        print(f"\nStopped. {CONTINUES}", file=sys.stderr)
        raise
    return print_outcome(pipeline, outcome, json)
