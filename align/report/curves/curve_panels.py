"""Training curves as small panels, with the numbers that the page's script needs to read values off them.

The axes of a panel have a fixed place. That makes a panel cheap to draw, and the script can put a line over it. A curve
with more logged steps than points is drawn as means, with the range of the averaged values behind them. Panels are not
smoothed; the page's script enlarges one to zoom and smooth.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.curves.metric_series import Events, group_by_panel, is_episode_panel
from align.report.page.assets import AssetWriter
from align.report.page.number_format import number
from align.report.page.panels import COLORS, INK, LINES, MARKERS, Panel, legend_name, nth, styled
from align.report.page.ticks import set_short_ticks

OPEN_PANELS = 8
"""Curves of a stage that are open at first; the rest is folded."""
MAX_PANELS = 18
WIDTH, HEIGHT = 3.0, 1.95
"""Inches."""
AXES_BOX = (0.17, 0.2, 0.8, 0.66)
"""Left, bottom, width and height of the axes, as shares of the panel."""
POINTS_PER_INCH = 72
MAX_MARKERS = 20
"""Curves with at most so many points are drawn with markers."""
DIGITS = 6


@dataclass(frozen=True)
class Curve:
    """A drawn panel and its numbers: ``reading`` is plain data, in the units of the SVG's view box."""

    title: str
    svg: Markup
    reading: dict[str, Any]


def curve_sections(
    events: Mapping[str, Events], assets: AssetWriter
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the panels of each stage, and every panel's numbers in the same order.

    The first panels of a stage are open, the rest is folded.
    """
    sections: list[dict[str, Any]] = []
    readings: list[dict[str, Any]] = []
    for stage, stage_events in events.items():
        curves, left_out = stage_curves(stage_events, MAX_PANELS)
        if curves:
            panels = add_panels(stage, curves, readings, assets)
            sections.append(curve_section(stage, panels, left_out, _steps_per_point(stage_events)))
    return sections, readings


def add_panels(
    stage: str, curves: Sequence[Curve], readings: list[dict[str, Any]], assets: AssetWriter
) -> list[dict[str, Any]]:
    """Add the curves' figures to ``assets`` and their numbers to ``readings``; return the panels for the template."""
    panels = []
    for curve in curves:
        figure = assets.add_figure(f"curve-{stage}-{curve.title}", curve.svg, f"{stage}: {curve.title}")
        # The page's script finds a panel's numbers by this index.
        panels.append({"figure": figure, "number": len(readings)})
        readings.append({"stage": stage, "title": curve.title, **curve.reading})
    return panels


def curve_section(
    stage: str, panels: list[dict[str, Any]], left_out: list[str], steps_per_point: int
) -> dict[str, Any]:
    """Return a stage's panels for the template: the first ones open, the rest folded."""
    return {
        "stage": stage,
        "first": panels[:OPEN_PANELS],
        "more": panels[OPEN_PANELS:],
        "left_out": left_out,
        "averaged": steps_per_point,
    }


def _steps_per_point(events: Events) -> int:
    """Return the number of logged steps that a point averages in the longest curve; 1 if every step is drawn."""
    averaged = [-(-events.logged[name] // len(events.series[name][0])) for name in events.spread]
    return max(averaged, default=1)


def stage_curves(events: Events, limit: int) -> tuple[list[Curve], list[str]]:
    """Return a stage's panels in reading order, and the titles of those beyond ``limit``.

    A single point is not drawn; the record has its value. Panels about episodes do not count towards ``limit``.
    """
    panels = group_by_panel({name: points for name, points in events.series.items() if len(points[0]) > 1})
    limit += sum(is_episode_panel(title) for title, _ in panels)
    curves = [draw_curve(title, names, events) for title, names in panels[:limit]]
    return curves, [title for title, _ in panels[limit:]]


@dataclass(frozen=True)
class _Line:
    """A metric over steps, as it is drawn; ``low`` and ``high`` are its spread if points average several steps."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def _line(name: str, events: Events) -> _Line:
    steps, values = events.series[name]
    low, high = events.spread.get(name, ((), ()))
    return _Line(name, tuple(steps), tuple(values), tuple(low), tuple(high))


def draw_curve(title: str, names: Sequence[str], events: Events) -> Curve:
    """Draw one panel: the metrics ``names`` (training first, then held out) over steps."""
    drawing, reading = _draw_lines(title, tuple(_line(name, events) for name in names))
    return Curve(title, Panel.embed(drawing, _spoken_label(title, names, events.series)), reading)


# A process that writes the page of a running run draws the curves of finished stages once.
@functools.lru_cache(maxsize=512)
@styled
def _draw_lines(title: str, lines: tuple[_Line, ...]) -> tuple[str, dict[str, Any]]:
    """Return the panel as an SVG file, and its numbers."""
    panel = Panel(WIDTH, HEIGHT, AXES_BOX)
    axes = panel.axes
    for index, line in enumerate(lines):
        if line.low:
            axes.fill_between(line.steps, line.low, line.high, color=nth(COLORS, index), alpha=0.2, linewidth=0)
        axes.plot(
            line.steps,
            line.values,
            color=nth(COLORS, index),
            linestyle=nth(LINES, index),
            marker=nth(MARKERS, index) if len(line.steps) <= MAX_MARKERS else None,
            markersize=3.5,
            label=legend_name(line.name),
        )
    label_axes(axes)
    axes.set_title(printable(title)[:44], fontsize=9.5, loc="left", color=INK)
    if len(lines) > 1:
        axes.legend(loc="best")
    drawing = panel.drawing()
    return drawing, axes_reading(axes, AXES_BOX, (WIDTH, HEIGHT), [_line_numbers(line) for line in lines])


def label_axes(axes: Any) -> None:
    """Set short tick labels, which fit into a fixed space, and label the axis of steps."""
    set_short_ticks(axes)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", labelpad=1)


def axes_reading(
    axes: Any, box: tuple[float, float, float, float], size: tuple[float, float], lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the geometry that the script needs: the axes' box in the SVG's points, their limits, and the lines.

    ``box`` is left, bottom, width and height as shares of ``size`` (inches). SVG counts downwards from the top.
    """
    left, bottom, box_width, box_height = box
    width, height = size
    x_limits, y_limits = axes.get_xlim(), axes.get_ylim()
    return {
        "box": [
            left * width * POINTS_PER_INCH,
            # matplotlib counts from the bottom, SVG from the top.
            (1 - bottom - box_height) * height * POINTS_PER_INCH,
            (left + box_width) * width * POINTS_PER_INCH,
            (1 - bottom) * height * POINTS_PER_INCH,
        ],
        "x": [short_number(x_limits[0]), short_number(x_limits[1])],
        "y": [short_number(y_limits[0]), short_number(y_limits[1])],
        "lines": lines,
    }


def _line_numbers(line: _Line) -> dict[str, Any]:
    numbers: dict[str, Any] = {"name": line.name, "x": step_numbers(line.steps), "y": short_numbers(line.values)}
    if line.low:
        numbers |= {"low": short_numbers(line.low), "high": short_numbers(line.high)}
    return numbers


def _spoken_label(
    title: str, names: Sequence[str], series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> str:
    """Return the text for screen readers: the first and the last value of each line."""
    changes = [f"{name} from {number(series[name][1][0])} to {number(series[name][1][-1])}" for name in names]
    return f"{title} over steps: {', '.join(changes)}"


def short_number(value: float) -> float:
    """Return a number with :data:`DIGITS` significant digits, which keeps thousands of numbers small as JSON."""
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def step_numbers(steps: Sequence[float]) -> list[float]:
    """Return steps with all their digits before the point; means of several steps have one behind it."""
    return [int(step) if float(step).is_integer() else round(step, 1) for step in steps]


def short_numbers(values: Sequence[float]) -> list[float]:
    """Return ``values`` as :func:`short_number` has them."""
    return [short_number(value) for value in values]
