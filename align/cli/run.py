"""``align run``: run a pipeline here or on a cluster, show its progress, and write the page about it."""

from __future__ import annotations

import argparse
import sys

from align.cli.parser import print_warning
from align.cli.run_session import print_outcome, run_and_report
from align.config.shipped import find_shipped
from align.errors import UserError, printable
from align.pipeline.pipeline import Pipeline
from align.pipeline.stop_signal import Stopped
from align.runner.prepare import RunOptions


def load(options: argparse.Namespace) -> Pipeline:
    """Load the pipeline of the command line with its ``--set`` options."""
    return Pipeline.load(
        find_shipped(options.pipeline), options.assignments, getattr(options, "on", None), print_warning
    )


def print_pins(pipeline: Pipeline) -> None:
    """Print what the pipeline's stages name and the file leaves open, such as a Hub model's commit."""
    for name, fields in pipeline.pins.items():
        values = ", ".join(f"{field}: {value}" for field, value in fields.items())
        print(printable(f"{name} takes {values}"))


def print_recipes(pipeline: Pipeline) -> None:
    """Print, as comments, the recipe that each data stage with a dataset stands for."""
    from align.config.stages.data import DataConfig
    from align.config.yaml import dump_yaml
    from align.stages.data import resolved_recipe

    for node in pipeline:
        if isinstance(node.config, DataConfig) and node.config.dataset is not None:
            settings = resolved_recipe(node.config, pipeline.base).model_dump(mode="json", exclude_unset=True)
            print(f"\n# The recipe that stages.{node.name} stands for; in a file of its own it can get steps:")
            for line in dump_yaml(settings).splitlines():
                print(printable(f"# {line}"))


def run(options: argparse.Namespace) -> int:
    """run the pipeline and write its report; finished stages are skipped, a killed one resumes"""
    pipeline = load(options)
    if not options.json:
        print_pins(pipeline)
    run_options = RunOptions(options.store, options.only, options.from_, tuple(options.rebuild), options.strict)
    executor = pipeline.config.runtime.executor.name
    if executor == "slurm":
        from align.cli.run_on_slurm import run_on_slurm

        return run_on_slurm(pipeline, run_options, detach=options.detach, json=options.json)
    if options.detach:
        raise UserError("--detach leaves a run to a scheduler that outlives this command: add --on slurm.")
    if executor == "ray":
        from align.cli.run_on_ray import run_on_ray

        return run_on_ray(pipeline, run_options, json=options.json)
    try:
        outcome = run_and_report(pipeline, quiet=options.json, **vars(run_options))
    except KeyboardInterrupt:
        print("\nStopped; finished stages and checkpoints are kept. The same command continues.", file=sys.stderr)
        raise
    except Stopped as error:
        raise Stopped(f"{error} Finished stages and checkpoints are kept. The same command continues.") from None
    return print_outcome(pipeline, outcome, options.json)
