"""Figures across runs: score against KL with the best trade-offs marked, and curves of several runs in one panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.compare.merged_scorecard import Card
from align.report.curves.curve_panels import MAX_MARKERS, Curve, axes_reading, label_axes, short_numbers, step_numbers
from align.report.curves.metric_series import Events, group_by_panel
from align.report.page.number_format import number
from align.report.page.panels import COLORS, INK, LINES, MARKERS, Panel, error_bars, legend_name, nth, styled
from align.report.scorecard.kl_plots import root_axis

WIDTH, HEIGHT = 5.6, 2.5
"""Size of a panel of curves in inches."""
AXES_BOX = (0.1, 0.17, 0.56, 0.7)
"""Left, bottom, width and height of its axes, as shares of the panel; the rest of it is for the names."""
MAX_RUNS = 21
"""Runs in the panels of a stage; the names of more would not fit next to the axes."""


@dataclass(frozen=True)
class Point:
    """A system's KL and score, with the run that it belongs to (empty for a system of all runs)."""

    label: str
    run: str
    kl: Mapping[str, Any]
    score: Mapping[str, Any]


def points(card: Card, metric: str, run_of: Mapping[str, str]) -> list[Point]:
    """Return the systems whose KL and ``metric`` are known; systems with only a bound on KL (best of N) are skipped."""
    known = []
    for label in card["policies"]:
        kl = card["estimates"][label].get("kl")
        score = card["estimates"][label].get(metric)
        if not kl or not score or kl["value"] is None or score["value"] is None:
            continue
        # A bound is not a position: plotted, it would look like a measurement.
        if kl.get("method") != "upper bound":
            known.append(Point(label, run_of.get(label, ""), kl, score))
    return known


def pareto_front(candidates: Sequence[Point], better: str | None) -> list[Point]:
    """Return the Pareto front, by KL: the points for which no other has at most their KL and at least their score.

    Of points with equal KL and score the first one counts.
    """
    sign = -1.0 if better == "lower" else 1.0
    front: list[Point] = []
    # Sweep by KL; among equal KL the best score comes first. A point is on the front if its score beats all before.
    for point in sorted(candidates, key=lambda point: (point.kl["value"], -sign * point.score["value"])):
        if not front or sign * point.score["value"] > sign * front[-1].score["value"]:
            front.append(point)
    return front


@styled
def pareto_plot(candidates: Sequence[Point], front: Sequence[Point], title: str, reference: str) -> Markup:
    """Draw one point per checkpoint, with a marker and a color for each run, and rings and a line on the front."""
    panel = Panel(7.2, 3.6)
    axes = panel.axes
    for index, run in enumerate(dict.fromkeys(point.run for point in candidates)):
        label: str | None = legend_name(run or "in all runs")
        for point in candidates:
            if point.run != run:
                continue
            axes.errorbar(
                point.kl["value"],
                point.score["value"],
                xerr=error_bars(point.kl),
                yerr=error_bars(point.score),
                marker=nth(MARKERS, index),
                color=_run_color(index),
                markersize=7,
                markeredgecolor="white",
                capsize=2,
                linewidth=1.0,
                linestyle="none",
                label=label,
            )
            label = None  # one entry of the legend for each run
    axes.plot(
        [point.kl["value"] for point in front],
        [point.score["value"] for point in front],
        linestyle="--",
        color=INK,
        linewidth=1.0,
        marker="o",
        markersize=14,
        markerfacecolor="none",
        markeredgecolor=INK,
        label="best trade-offs",
    )
    for point in front:
        axes.annotate(
            legend_name(point.label),
            (point.kl["value"], point.score["value"]),
            xytext=(9, -11),
            textcoords="offset points",
            fontsize=7.5,
        )
    root_axis(panel)
    axes.set_xlabel(f"KL to {printable(reference)} (nats, root scale)")
    axes.set_ylabel(printable(title))
    axes.margins(0.14)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    names = ", ".join(point.label for point in front)
    return panel.svg(f"{title} against KL to {reference}; the best trade-offs are {names}")


def drawn_runs(by_run: Mapping[str, Events]) -> tuple[dict[str, Events], list[str]]:
    """Return the first ``MAX_RUNS`` runs, and the names of the runs that the panels omit."""
    return dict(list(by_run.items())[:MAX_RUNS]), list(by_run)[MAX_RUNS:]


def overlays(by_run: Mapping[str, Events], limit: int) -> tuple[list[Curve], list[str]]:
    """Return a panel for each metric that some run logged more than once, and the names of those beyond ``limit``.

    A panel has a line for each run.
    """
    # A single point is not a curve, but a run with one point is drawn along with the others.
    plotted: dict[str, None] = {}
    for name in dict.fromkeys(name for events in by_run.values() for name in events.series):
        if any(len(events.series[name][0]) > 1 for events in by_run.values() if name in events.series):
            plotted[name] = None
    names = [name for _, group in group_by_panel(plotted) for name in group]
    return [draw_overlay(name, by_run) for name in names[:limit]], names[limit:]


@styled
def draw_overlay(title: str, by_run: Mapping[str, Events]) -> Curve:
    """Draw one metric over steps with a line for each run; return it with its numbers for the page's script."""
    panel = Panel(WIDTH, HEIGHT, AXES_BOX)
    axes = panel.axes
    lines = []
    changes = []
    for index, (run, events) in enumerate(by_run.items()):
        if title not in events.series:
            continue
        steps, values = events.series[title]
        axes.plot(
            steps,
            values,
            color=_run_color(index),
            linestyle=_run_line(index),
            label=legend_name(run),
            linewidth=1.4,
            marker=nth(MARKERS, index) if len(steps) <= MAX_MARKERS else None,
            markersize=3.5,
        )
        numbers = {"x": step_numbers(steps), "y": short_numbers(values)}
        # A run keeps its color if runs before it lack this curve.
        lines.append({"name": printable(run), "style": index, **numbers})
        changes.append(f"{run} from {number(values[0])} to {number(values[-1])}")
    label_axes(axes)
    axes.set_title(printable(title)[:60], fontsize=9.5, loc="left", color=INK)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7.5)
    svg = panel.svg(f"{title} over steps: {', '.join(changes)}")
    return Curve(title, svg, axes_reading(axes, AXES_BOX, (WIDTH, HEIGHT), lines))


def _run_color(index: int) -> Any:
    return nth(COLORS, index)


def _run_line(index: int) -> Any:
    """Return a line style that shifts each time the colors start over, so no two runs look alike."""
    return nth(LINES, index + index // len(COLORS))
