"""Figures across runs: score against KL with the best trade-offs marked, and a stage's curves over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.compare.cards import Card
from align.report.curve_figures import Curve
from align.report.curves import Events, panels
from align.report.drift import root_axis
from align.report.figures import COLORS, INK, LINES, MARKERS, Panel, bars, legend_name, nth, styled
from align.report.wording import number

WIDTH, HEIGHT = 5.6, 2.5
PLACE = (0.1, 0.17, 0.56, 0.7)
"""Size in inches and place of the axes of a panel of curves; the rest of it is for the names."""
POINTS = 72
MOST_LINES = 21
"""Runs of a panel; beyond it names would not fit beside the axes."""
FEW = 20


@dataclass(frozen=True)
class Point:
    """A system's KL and score, with the run it belongs to (empty where all runs share it)."""

    label: str
    run: str
    kl: Mapping[str, Any]
    score: Mapping[str, Any]


def points(card: Card, metric: str, run_of: Mapping[str, str]) -> list[Point]:
    """Systems of which KL and ``metric`` are known; a KL that is only bounded (best of N) is not."""
    found = []
    for label in card["policies"]:
        own = card["estimates"][label]
        kl, score = own.get("kl"), own.get(metric)
        if not kl or not score or kl["value"] is None or score["value"] is None or kl.get("method") == "upper bound":
            continue
        found.append(Point(label, run_of.get(label, ""), kl, score))
    return found


def front(found: Sequence[Point], better: str | None) -> list[Point]:
    """Points that no other one beats: no more KL, no worse a score, and one of the two better. By KL."""
    sign = -1.0 if better == "lower" else 1.0
    best: list[Point] = []
    for one in sorted(found, key=lambda point: (point.kl["value"], -sign * point.score["value"])):
        if not best or sign * one.score["value"] > sign * best[-1].score["value"]:
            best.append(one)
    return best


@styled
def pareto(found: Sequence[Point], best: Sequence[Point], title: str, reference: str) -> Markup:
    """One point per checkpoint, a marker and a color for each run; rings and a line on the front."""
    panel = Panel(7.2, 3.6)
    axes = panel.axes
    runs = list(dict.fromkeys(point.run for point in found))
    for at, run in enumerate(runs):
        for first, point in enumerate(one for one in found if one.run == run):
            axes.errorbar(
                point.kl["value"], point.score["value"], xerr=bars(point.kl), yerr=bars(point.score),
                marker=nth(MARKERS, at), color=_color(at), markersize=7, markeredgecolor="white", capsize=2,
                linewidth=1.0, linestyle="none", label=None if first else legend_name(run or "in all runs"),
            )  # fmt: skip
    axes.plot(
        [one.kl["value"] for one in best], [one.score["value"] for one in best], linestyle="--", color=INK,
        linewidth=1.0, marker="o", markersize=14, markerfacecolor="none", markeredgecolor=INK, label="best trade-offs",
    )  # fmt: skip
    for one in best:
        axes.annotate(
            legend_name(one.label), (one.kl["value"], one.score["value"]), xytext=(9, -11),
            textcoords="offset points", fontsize=7.5,
        )  # fmt: skip
    root_axis(panel)
    axes.set_xlabel(f"KL to {printable(reference)} (nats, root scale)")
    axes.set_ylabel(printable(title))
    axes.margins(0.14)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return panel.svg(f"{title} against KL to {reference}; the best trade-offs are {', '.join(p.label for p in best)}")


def overlays(by_run: Mapping[str, Events], most: int) -> tuple[list[Curve], list[str]]:
    """A panel per metric that some run logged more than once, a line a run; and names of those beyond ``most``."""
    several = {name for events in by_run.values() for name, series in events.series.items() if len(series[0]) > 1}
    names = [name for _, group in panels(dict.fromkeys(_in_order(by_run, several))) for name in group]
    return [overlay(name, by_run) for name in names[:most]], names[most:]


def _in_order(by_run: Mapping[str, Events], wanted: set[str]) -> list[str]:
    seen = dict.fromkeys(name for events in by_run.values() for name in events.series)
    return [name for name in seen if name in wanted]


@styled
def overlay(title: str, by_run: Mapping[str, Events]) -> Curve:
    """One metric over steps, a line a run, and its numbers for the page's script (as ``curve_figures`` has them)."""
    from matplotlib.ticker import MaxNLocator

    panel = Panel(WIDTH, HEIGHT, PLACE)
    axes = panel.axes
    lines, said = [], []
    for at, (run, events) in enumerate(by_run.items()):
        if title not in events.series or at >= MOST_LINES:
            continue
        steps, values = events.series[title]
        axes.plot(
            steps, values, color=_color(at), linestyle=_line(at), label=legend_name(run), linewidth=1.4,
            marker=nth(MARKERS, at) if len(steps) <= FEW else None, markersize=3.5,
        )  # fmt: skip
        lines.append({"name": printable(run), "x": [_short(x) for x in steps], "y": [_short(y) for y in values]})
        said.append(f"{run} from {number(values[0])} to {number(values[-1])}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", labelpad=1)
    axes.set_title(printable(title)[:60], fontsize=9.5, loc="left", color=INK)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7.5)
    svg = panel.svg(f"{title} over steps: {', '.join(said)}")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    reading = {
        "box": [PLACE[0] * WIDTH * POINTS, (1 - PLACE[1] - PLACE[3]) * HEIGHT * POINTS,
                (PLACE[0] + PLACE[2]) * WIDTH * POINTS, (1 - PLACE[1]) * HEIGHT * POINTS],
        "x": [_short(left), _short(right)],
        "y": [_short(bottom), _short(top)],
        "lines": lines,
    }  # fmt: skip
    return Curve(title, svg, reading)


def _color(at: int) -> Any:
    return nth(COLORS, at)


def _line(at: int) -> Any:
    """Another style each time the colors begin anew, so that no two runs look alike."""
    return nth(LINES, at + at // len(COLORS))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
