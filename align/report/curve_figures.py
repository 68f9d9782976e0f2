"""Training curves as small panels, and what the page's script needs to read values off them.

A panel's axes have a fixed place, which makes a panel cheap to draw and lets the script put a line over it. A curve of
more logged steps than points is drawn as means with the range of what they stand for behind them. Leaves out smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.curves import Events, panels
from align.report.figures import COLORS, INK, LINES, MARKERS, Panel, legend_name, nth, styled
from align.report.wording import number

WIDTH, HEIGHT = 3.0, 1.95
"""Inches."""
PLACE = (0.17, 0.2, 0.8, 0.66)
"""Left, bottom, width and height of the axes, as shares of the panel."""
POINTS = 72
FEW = 20
"""Curves of no more points are drawn with markers."""
DIGITS = 6
LEAST, MOST = 0.01, 1e5
"""Axes whose largest number is beyond these have powers of ten on them."""


@dataclass(frozen=True)
class Curve:
    """A drawn panel and its numbers: ``reading`` is JSON-able, in the units of the SVG's view box."""

    title: str
    svg: Markup
    reading: dict[str, Any]


def stage_curves(events: Events, most: int) -> tuple[list[Curve], list[str]]:
    """Panels of a stage in reading order, and the names of those beyond ``most``.

    A single point is no curve; its value stands in the record.
    """
    groups = panels({name: points for name, points in events.series.items() if len(points[0]) > 1})
    return [curve(title, names, events) for title, names in groups[:most]], [title for title, _ in groups[most:]]


@styled
def curve(title: str, names: Sequence[str], events: Events) -> Curve:
    """One panel: ``names`` (training, then held out) over steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panel = Panel(WIDTH, HEIGHT, PLACE)
    axes = panel.axes
    for index, name in enumerate(names):
        steps, values = events.series[name]
        if name in events.spread:
            low, high = events.spread[name]
            axes.fill_between(steps, low, high, color=nth(COLORS, index), alpha=0.2, linewidth=0)
        axes.plot(
            steps, values, color=nth(COLORS, index), linestyle=nth(LINES, index),
            marker=nth(MARKERS, index) if len(steps) <= FEW else None, markersize=3.5, label=legend_name(name),
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        powers = not LEAST <= max(map(abs, ends)) < MOST
        axis.set_major_formatter(FuncFormatter(lambda value, _, powers=powers: _tick(value, powers)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", labelpad=1)
    axes.set_title(printable(title)[:44], fontsize=9.5, loc="left", color=INK)
    if len(names) > 1:
        axes.legend(loc="best")
    svg = panel.svg(_said(title, names, events.series))
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    reading = {
        "box": [PLACE[0] * WIDTH * POINTS, (1 - PLACE[1] - PLACE[3]) * HEIGHT * POINTS,
                (PLACE[0] + PLACE[2]) * WIDTH * POINTS, (1 - PLACE[1]) * HEIGHT * POINTS],
        "x": [_short(left), _short(right)],
        "y": [_short(bottom), _short(top)],
        "lines": [_line(name, events) for name in names],
    }  # fmt: skip
    return Curve(title, svg, reading)


def _line(name: str, events: Events) -> dict[str, Any]:
    steps, values = events.series[name]
    line: dict[str, Any] = {"name": name, "x": [_short(x) for x in steps], "y": [_short(y) for y in values]}
    if name in events.spread:
        low, high = events.spread[name]
        line |= {"low": [_short(x) for x in low], "high": [_short(x) for x in high]}
    return line


def _said(title: str, names: Sequence[str], series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """What a screen reader says: the way from the first to the last value of each line."""
    ways = [f"{name} from {number(series[name][1][0])} to {number(series[name][1][-1])}" for name in names]
    return f"{title} over steps: {', '.join(ways)}"


def _tick(value: float, powers: bool) -> str:
    """A short label: the room to the left of the axes is fixed."""
    if not value or not powers:
        return f"{value:.4g}".replace("-", "−")
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}".replace("-", "−")


def _short(value: float) -> float:
    """A number with the digits that a reader could want, so that thousands of them stay small."""
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
