"""The pipeline of a command line: load it, and print what it stands for. Imports neither runner nor report."""

from __future__ import annotations

import argparse

from align.cli.parser import print_warning
from align.config.shipped import find_shipped
from align.errors import printable
from align.pipeline.pipeline import Pipeline


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
    from align.config.stages.inputs import DataConfig
    from align.config.yaml import dump_yaml
    from align.stages.data import resolved_recipe

    for node in pipeline:
        if isinstance(node.config, DataConfig) and node.config.dataset is not None:
            settings = resolved_recipe(node.config, pipeline.base).model_dump(mode="json", exclude_unset=True)
            print(f"\n# The recipe that stages.{node.name} stands for; in a file of its own it can get steps:")
            for line in dump_yaml(settings).splitlines():
                print(printable(f"# {line}"))
