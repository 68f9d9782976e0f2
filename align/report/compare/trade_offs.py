"""Score against KL across runs: the best trade-offs, and KLs that differ by orders of magnitude."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.evaluation.scorecard import program_metrics
from align.report.compare.merged_scorecard import Card, EvaluatedRun
from align.report.page.assets import AssetWriter
from align.report.page.metric_series import Events
from align.report.page.number_format import number
from align.report.page.panels import INK, Panel, legend_name, styled
from align.report.scorecard.conclusions import metric_phrase
from align.report.scorecard.score_plots import root_axis
from align.store.artifacts import Artifact

GAP = 100.0
"""Ratio of two typical KLs from which a comparison reports them."""
LEAST_KL = 0.01
"""Nats a response: below it the larger KL is small as well, and the ratio is noise."""


@dataclass(frozen=True)
class Point:
    """A system's KL and score, with the run that it belongs to (empty for a system of all runs)."""

    label: str
    run: str
    kl: Mapping[str, Any]
    score: Mapping[str, Any]


def find_trade_offs(evaluated: Sequence[EvaluatedRun], card: Card | None, assets: AssetWriter) -> list[dict[str, Any]]:
    """Return figures of score against KL, each with a sentence on its front; none if KL was not measured."""
    if card is None:
        return []
    run_of = {label: run.name for run in evaluated for name, label in run.labels.items() if label != name}
    # KL is a distance from the reference; with different references the points share no axis.
    references = {_system_key(run.card, run.card["reference"]) for run in evaluated}
    warning = ""
    if len(references) > 1:
        warning = " Runs measure KL to different references, so compare it within a run only."
    trade_offs: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    scores = [name for name in (*program_metrics(card["metrics"]), "reward") if name in card["metrics"]]
    for name in scores or [card["primary"]]:
        metric = card["metrics"].get(name)
        candidates = _points(card, name, run_of)
        if metric is None or len(candidates) < 2:
            continue
        front = pareto_front(candidates, metric["better"])
        for point in candidates:
            values = {"kl": point.kl["value"], "value": point.score["value"], "best": point in front}
            rows.append({"score": name, "system": point.label, "run": point.run, **values})
        caption = (
            f"{metric['title']} against KL to {card['reference']}, one point per checkpoint with 95 % intervals. "
            f"Ringed and joined: the checkpoints that no other beats in both.{warning}"
        )
        plot = _pareto_plot(candidates, front, metric["title"], card["reference"])
        names = ", ".join(point.label for point in front)
        text = f"Best trade-offs of {metric_phrase(card, name)} and KL: {names}.{warning}"
        trade_offs.append({"figure": assets.add_figure(f"trade-off-{name}", plot, caption), "text": text})
    if rows:
        assets.add_table("trade-offs", rows)
    return trade_offs


def _system_key(card: Card, name: str) -> str:
    return next((str(system["key"]) for system in card["systems"] if system["name"] == name), name)


def _points(card: Card, metric: str, run_of: Mapping[str, str]) -> list[Point]:
    """Return the systems with a KL and ``metric``; systems with only a bound on KL (best of N) are skipped."""
    points = []
    for label in card["policies"]:
        kl = card["estimates"][label].get("kl")
        score = card["estimates"][label].get(metric)
        if not kl or not score or kl["value"] is None or score["value"] is None:
            continue
        # A bound is not a position: plotted, it would look like a measurement.
        if kl.get("method") != "upper bound":
            points.append(Point(label, run_of.get(label, ""), kl, score))
    return points


def pareto_front(candidates: Sequence[Point], better: str | None) -> list[Point]:
    """Return the Pareto front, by KL: the points for which no other has at most their KL and at least their score.

    Of points with equal KL and score the first point counts.
    """
    sign = -1.0 if better == "lower" else 1.0
    front: list[Point] = []
    # Sweep by KL; among equal KL the best score comes first. A point is on the front if its score beats all before.
    for point in sorted(candidates, key=lambda point: (point.kl["value"], -sign * point.score["value"])):
        if not front or sign * point.score["value"] > sign * front[-1].score["value"]:
            front.append(point)
    return front


@styled
def _pareto_plot(candidates: Sequence[Point], front: Sequence[Point], title: str, reference: str) -> Markup:
    """Draw one point per checkpoint, with a marker and a color for each run, and rings and a line on the front."""
    panel = Panel(7.2, 3.6)
    axes = panel.axes
    style = {"markersize": 7, "markeredgecolor": "white", "linewidth": 1.0, "linestyle": "none"}
    for index, run in enumerate(dict.fromkeys(point.run for point in candidates)):
        label: str | None = legend_name(run or "in all runs")
        for point in candidates:
            if point.run == run:
                panel.add_point(point.kl, point.score, index, label=label, **style)
                label = None  # one entry of the legend for each run
    ring = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "markeredgecolor": INK}
    kls = [point.kl["value"] for point in front]
    scores = [point.score["value"] for point in front]
    axes.plot(kls, scores, linestyle="--", color=INK, linewidth=1.0, label="best trade-offs", **ring)
    for point, kl, score in zip(front, kls, scores, strict=True):
        axes.annotate(legend_name(point.label), (kl, score), (9, -11), textcoords="offset points", fontsize=7.5)
    root_axis(panel)
    axes.set_xlabel(f"KL to {printable(reference)} (nats, root scale)")
    axes.set_ylabel(printable(title))
    axes.margins(0.14)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    names = ", ".join(point.label for point in front)
    return panel.svg(f"{title} against KL to {reference}; the best trade-offs are {names}")


# ---- gaps ---------------------------------------------------------------------------------------------------------


def kl_gaps(runs: Mapping[str, Mapping[str, Artifact]], events: Mapping[str, Mapping[str, Events]]) -> list[str]:
    """Return a sentence for each stage whose KL differs by two orders of magnitude between runs.

    ``events`` has run → stage → its events. Stages are compared by name. Runs without a common stage are compared by
    their last stages that have a KL.
    """
    measured = {run: _typical_kls(by_stage) for run, by_stage in events.items()}
    stages = dict.fromkeys(stage for by_stage in measured.values() for stage in by_stage)
    groups = [{run: stage for run, by_stage in measured.items() if stage in by_stage} for stage in stages]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        groups = [{run: list(by_stage)[-1] for run, by_stage in measured.items() if by_stage}]
    texts = []
    for group in groups:
        # Runs that share the artifact also share its KL.
        by_key = {str(runs[run][stage].record.get("key")): (run, stage) for run, stage in group.items()}
        texts.append(_describe_gap({place: measured[place[0]][place[1]] for place in by_key.values()}))
    return [text for text in texts if text]


def _typical_kls(by_stage: Mapping[str, Events]) -> dict[str, float]:
    """Return the median KL of the second half of each stage's updates. A stage with one update has no typical KL.

    The first update samples from the reference itself, so its KL is 0 in every run.
    """
    typical = {}
    for stage, events in by_stage.items():
        values = events.series.get("kl", ([], []))[1]
        if len(values) > 1:
            typical[stage] = statistics.median(values[len(values) // 2 :])
    return typical


def _describe_gap(kls: Mapping[tuple[str, str], float]) -> str:
    """Return a sentence about the largest and the smallest KL; empty if they are less than ``GAP`` apart."""
    if len(kls) < 2:
        return ""
    low = min(kls, key=lambda place: kls[place])
    high = max(kls, key=lambda place: kls[place])
    if kls[high] < LEAST_KL or kls[high] < GAP * kls[low]:
        return ""
    times = f", {number(kls[high] / kls[low], 2)} times as large" if kls[low] > 0 else ""
    return (
        f"{low[0]}: {low[1]} has a KL of {number(kls[low])} nats a response, and {high[0]}: {high[1]} has "
        f"{number(kls[high])}{times}. One policy has hardly moved or the other one has left its reference: compare "
        "learning_rate, kl_coef and the number of updates before the scores."
    )
