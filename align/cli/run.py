"""``align run``: run a pipeline here or on a cluster, show its progress, and write the page about it."""

from __future__ import annotations

import argparse
import sys

from align.cli.loading import load, print_pins
from align.cli.run_session import print_outcome, run_and_report
from align.errors import UserError
from align.pipeline.stop_signal import Stopped
from align.runner.runner import RunOptions


def run(options: argparse.Namespace) -> int:
    """run the pipeline and write its report; finished stages are skipped, a killed one resumes"""
    pipeline = load(options)
    if not options.json:
        print_pins(pipeline)
    run_options = RunOptions(options.store, options.only, options.from_, tuple(options.rebuild), options.strict)
    executor = pipeline.config.runtime.executor.name
    if executor == "slurm":
        from align.cli.run_on_cluster import run_on_slurm

        return run_on_slurm(pipeline, run_options, detach=options.detach, json=options.json)
    if options.detach:
        raise UserError("--detach leaves a run to a scheduler that outlives this command: add --on slurm.")
    if executor == "ray":
        from align.cli.run_on_cluster import run_on_ray

        return run_on_ray(pipeline, run_options, json=options.json)
    try:
        outcome = run_and_report(pipeline, quiet=options.json, **vars(run_options))
    except KeyboardInterrupt:
        print("\nStopped; finished stages and checkpoints are kept. The same command continues.", file=sys.stderr)
        raise
    except Stopped as error:
        raise Stopped(f"{error} Finished stages and checkpoints are kept. The same command continues.") from None
    return print_outcome(pipeline, outcome, options.json)
