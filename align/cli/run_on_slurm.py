"""``align run --on slurm``: a run's stages as jobs, followed until they are over or left to the cluster."""

from __future__ import annotations

import sys

from align.cli.console import printable
from align.cli.parser import print_json
from align.cli.run import report_on, say_outcome
from align.clusters.follow import Following
from align.clusters.slurm.queue import SlurmQueue
from align.clusters.slurm.submit import Submitted, submit_run
from align.pipeline.pipeline import Pipeline
from align.runner.listener import Listener
from align.runner.prepare import RunOptions
from align.runner.runner import Run


def run_on_slurm(pipeline: Pipeline, options: RunOptions, *, detach: bool, json: bool) -> int:
    """Submit what is to be made, and follow it unless ``detach``; the exit code."""
    submitted = submit_run(pipeline, options)
    for message in submitted.warnings:
        print(f"! {printable(message)}", file=sys.stderr)
    if detach:
        _say_jobs(submitted, json)
        return 0

    def follow(listener: Listener) -> Run:
        return Following(pipeline, submitted.store, submitted.places, SlurmQueue(submitted), listener).follow()

    try:
        outcome = report_on(follow, pipeline, quiet=json, store=submitted.store)
    except KeyboardInterrupt:
        print(
            f"\nNo longer followed; its jobs go on. `align status {pipeline.name}` says how they are, the same command "
            f"follows them again, `align cancel {pipeline.name}` ends them.",
            file=sys.stderr,
        )
        raise
    return say_outcome(pipeline, outcome, json)


def _say_jobs(submitted: Submitted, json: bool) -> None:
    pipeline = submitted.pipeline
    jobs = {name: submitted.job(name) for name in submitted.places}
    if json:
        print_json({"name": pipeline.name, "store": str(submitted.store.root), "jobs": jobs, "new": submitted.new})
        return
    width = max((len(name) for name in jobs), default=0)
    for name, job in jobs.items():
        print(f"{name:<{width}}  job {job}{'' if name in submitted.new else ', submitted before'}")
    if jobs:
        print(f"`align status {pipeline.name}` says how they are, `align cancel {pipeline.name}` ends them.")
    else:
        print("Nothing to do: every stage is finished.")
