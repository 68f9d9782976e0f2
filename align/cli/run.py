"""``align run``: run a pipeline here or on a cluster, show its progress, and write the page about it.

Stages run as processes of this command, as jobs of Slurm or as tasks of Ray; the command follows them until the end.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TYPE_CHECKING

from align.cli.parser import load, print_json, print_pins, print_warning
from align.cli.run_session import print_outcome, report_on, run_and_report
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.pipeline.stop_signal import Stopped
from align.runner.runner import RunOptions, prepare_run

if TYPE_CHECKING:
    from align.clusters.slurm_submit import SubmittedRun


def run(options: argparse.Namespace) -> int:
    """Run ``align run``."""
    pipeline = load(options)
    if not options.json:
        print_pins(pipeline)
    run_options = RunOptions(options.store, options.only, options.from_, tuple(options.rebuild), options.strict)
    executor = pipeline.config.runtime.executor.name
    if executor == "slurm":
        return run_on_slurm(pipeline, run_options, detach=options.detach, json=options.json)
    if options.detach:
        raise UserError("--detach leaves a run to a scheduler that outlives this command: add --on slurm.")
    if executor == "ray":
        return run_on_ray(pipeline, run_options, json=options.json)
    try:
        outcome = run_and_report(pipeline, quiet=options.json, **vars(run_options))
    except KeyboardInterrupt:
        print("\nStopped; finished stages and checkpoints are kept. The same command continues.", file=sys.stderr)
        raise
    except Stopped as error:
        raise Stopped(f"{error} Finished stages and checkpoints are kept. The same command continues.") from None
    return print_outcome(pipeline, outcome, options.json)


def run_on_slurm(pipeline: Pipeline, options: RunOptions, *, detach: bool, json: bool) -> int:
    """Submit the unfinished stages, and follow them unless ``detach``; returns the exit code."""
    from align.clusters.slurm_submit import follow_jobs, submit_run

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
    from align.clusters.ray import CONTINUES, run_tasks
    from align.inference import ray_client

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
