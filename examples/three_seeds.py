"""Run a pipeline with several seeds, and show what of a difference is the luck of training.

    python examples/three_seeds.py pipelines/smoke.yaml --metric reward --seeds 1 2 3

Prints mean and standard deviation over seeds for each system of the last evaluation, and plots the mean with a point
per seed. The stages in --share keep the pipeline's seed: they run once, and all seeds answer the same prompts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from align import Pipeline
from align.errors import StageFailed, UserError


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds, print the table, write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", nargs="?", default="pipelines/smoke.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--metric", help="default: the one that decides in the scorecard")
    parser.add_argument("--share", nargs="*", default=["model", "data"], help="stages that all seeds have in common")
    parser.add_argument("--set", action="append", default=[], help="override a field of the pipeline, in every run")
    parser.add_argument("--store", help="default: ./store")
    parser.add_argument("--plot", type=Path, default=Path("three_seeds.png"))
    options = parser.parse_args(arguments)

    pipeline = Pipeline.load(options.pipeline, options.set)
    metric, scores = measure(pipeline, options.seeds, options.share, options.metric, options.store)
    summary = scores.groupby("system", sort=False).value.agg(["mean", "std", "count"])
    print(f"\n{metric} over seeds\n{summary.to_string(float_format='{:.3f}'.format)}")
    plot(scores, metric).savefig(options.plot, dpi=150)
    print(f"Plot: {options.plot.resolve()}")


def measure(
    pipeline: Pipeline, seeds: list[int], share: list[str], metric: str | None, store: str | None
) -> tuple[str, pandas.DataFrame]:
    """Return the metric's name, and a row for each seed and system with its ``value``."""
    shared = {f"stages.{stage}.seed": pipeline.config.seed for stage in share}
    runs = {}
    for seed in seeds:
        # A separate name protects each run's artifacts from `align gc` and lets `align report` find the run.
        changes = {**shared, "seed": seed, "name": f"{pipeline.name}-seed-{seed}"}
        runs[seed] = pipeline.changed(changes).run(store=store, progress=True)
    card = runs[seeds[0]].scorecard()
    metric = metric or card.primary
    card.estimate(card.reference, metric)  # refuses a metric that nothing measures
    frame = pandas.concat({seed: run.frame() for seed, run in runs.items()}, names=["seed"]).reset_index("seed")
    return metric, frame[frame.system.notna() & (frame.metric == metric)]


def plot(scores: pandas.DataFrame, metric: str) -> Figure:
    """Return a figure with the systems side by side: a bar at the mean, and a point for each seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    means = scores.groupby("system", sort=False).value.mean()
    axes.hlines(means, [x - 0.3 for x in range(len(means))], [x + 0.3 for x in range(len(means))], color="black")
    places = {system: x for x, system in enumerate(means.index)}
    for seed, rows in scores.groupby("seed"):
        axes.scatter(rows.system.map(places), rows.value, label=f"seed {seed}", zorder=2)
    axes.set_xticks(range(len(means)), means.index)
    axes.set_ylabel(metric)
    axes.legend()
    return figure


if __name__ == "__main__":
    try:
        main()
    except (UserError, StageFailed) as error:
        sys.exit(str(error))
