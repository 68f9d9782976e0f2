"""Training curves as small panels, with the numbers that the page's script needs to read values off them.

A panel has the metrics of a stage, or one metric of several runs. Its axes have a fixed place. That makes a panel cheap
to draw, and the script can put a line over it. A curve with more logged steps than points is drawn as means, with the
range of the averaged values behind them. Panels are not smoothed; the page's script enlarges a panel to zoom and smooth
it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.page.assets import AssetWriter
from align.report.page.metric_series import Events, group_by_panel, is_episode_panel
from align.report.page.number_format import number
from align.report.page.panels import COLORS, INK, LINES, MARKERS, Panel, legend_name, nth, set_short_ticks, styled

OPEN_PANELS = 8
"""Curves of a stage that are open at first; the rest is folded."""
MAX_PANELS = 18
POINTS_PER_INCH = 72
MAX_MARKERS = 20
"""Curves with at most so many points are drawn with markers."""
DIGITS = 6


@dataclass(frozen=True)
class Layout:
    """Size of a panel in inches, and the place of its axes (left, bottom, width, height) as shares of the panel."""

    width: float
    height: float
    axes_box: tuple[float, float, float, float]
    max_title: int
    line_width: float


METRICS = Layout(3.0, 1.95, (0.17, 0.2, 0.8, 0.66), max_title=44, line_width=1.6)
RUNS = Layout(5.6, 2.5, (0.1, 0.17, 0.56, 0.7), max_title=60, line_width=1.4)
"""Layout of one metric of several runs; right of the axes are the names of the runs."""


@dataclass(frozen=True)
class Curve:
    """A drawn panel and its numbers: ``reading`` is plain data, in the units of the SVG's view box."""

    title: str
    svg: Markup
    reading: dict[str, Any]


@dataclass
class CurveSections:
    """The panels of each stage for the template, and every panel's numbers in the same order for the script."""

    assets: AssetWriter
    sections: list[dict[str, Any]] = field(default_factory=list)
    readings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, stage: str, curves: Sequence[Curve], left_out: Sequence[str], **more: Any) -> None:
        """Add a stage's curves, the first open and the rest folded; a stage without curves has no section."""
        panels = []
        for curve in curves:
            figure = self.assets.add_figure(f"curve-{stage}-{curve.title}", curve.svg, f"{stage}: {curve.title}")
            # The page's script finds a panel's numbers by this index.
            panels.append({"figure": figure, "number": len(self.readings)})
            self.readings.append({"stage": stage, "title": curve.title, **curve.reading})
        if panels:
            parts = {"first": panels[:OPEN_PANELS], "more": panels[OPEN_PANELS:], "left_out": left_out}
            self.sections.append({"stage": stage, **parts, "averaged": 1, "undrawn_runs": [], "changes": [], **more})


def curve_sections(events: Mapping[str, Events], assets: AssetWriter) -> CurveSections:
    """Return the panels of a run's stages."""
    sections = CurveSections(assets)
    for stage, stage_events in events.items():
        curves, left_out = stage_curves(stage_events, MAX_PANELS)
        changes = _change_marks(stage_events.changes)
        sections.add(stage, curves, left_out, averaged=_steps_per_point(stage_events), changes=changes)
    return sections


def _steps_per_point(events: Events) -> int:
    """Return the number of logged steps that a point averages in the longest curve; 1 if every step is drawn."""
    averaged = [-(-events.logged[name] // len(events.series[name][0])) for name in events.spread]
    return max(averaged, default=1)


def stage_curves(events: Events, limit: int) -> tuple[list[Curve], list[str]]:
    """Return a stage's panels in reading order, and the titles of those beyond ``limit``.

    A single point is not drawn; the record has its value. Panels about episodes do not count towards ``limit``.
    """
    panels, left_out = _choose_panels(events, limit)
    return [draw_curve(title, names, events) for title, names in panels], left_out


def curve_numbers(events: Events, limit: int = MAX_PANELS) -> dict[str, Any]:
    """Return a stage's panels as numbers, for a page that draws them itself.

    ``panels`` have a ``title`` and ``lines`` with ``name``, ``x`` and ``y``, and ``low`` and ``high`` if their points
    average several steps; ``left_out`` has the titles of panels beyond ``limit``.
    """
    panels, left_out = _choose_panels(events, limit)
    numbers = [
        {"title": title, "lines": [line.numbers() for line in _panel_lines(names, events)]} for title, names in panels
    ]
    facts = {"averaged": _steps_per_point(events), "changes": _change_marks(events.changes)}
    return {"panels": numbers, "left_out": left_out, **facts}


def _change_marks(changes: Mapping[float, str]) -> list[dict[str, Any]]:
    """Return the changes of settings as the scripts of the pages expect them."""
    return [{"x": step, "text": text} for step, text in changes.items()]


def _choose_panels(events: Events, limit: int) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Return (title, metrics) of the first ``limit`` panels, and the titles of the others."""
    panels = group_by_panel({name: points for name, points in events.series.items() if len(points[0]) > 1})
    limit += sum(is_episode_panel(title) for title, _ in panels)
    return panels[:limit], [title for title, _ in panels[limit:]]


def run_curves(by_run: Mapping[str, Events], limit: int) -> tuple[list[Curve], list[str]]:
    """Return a panel for each metric that some run logged more than once, and the names of those beyond ``limit``.

    A panel has a line for each run.
    """
    # A single point is not a curve, but a run with one point is drawn along with the others.
    plotted: dict[str, None] = {}
    for events in by_run.values():
        for name in events.series:
            if any(len(each.series[name][0]) > 1 for each in by_run.values() if name in each.series):
                plotted[name] = None
    names = [name for _, group in group_by_panel(plotted) for name in group]
    return [draw_run_curves(name, by_run) for name in names[:limit]], names[limit:]


@dataclass(frozen=True)
class _Line:
    """A metric over steps, as it is drawn; ``low`` and ``high`` are its spread if points average several steps."""

    name: str
    style: int
    """Index of the line's color, style and marker."""
    steps: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """Return the line's points for the page's script, which keep all digits of their steps."""
        steps = [int(step) if float(step).is_integer() else round(step, 1) for step in self.steps]
        numbers: dict[str, Any] = {"name": self.name, "x": steps, "y": short_numbers(self.values)}
        if self.low:
            numbers |= {"low": short_numbers(self.low), "high": short_numbers(self.high)}
        return numbers


def draw_curve(title: str, names: Sequence[str], events: Events) -> Curve:
    """Draw one panel: the metrics ``names`` (training first, then held out) over steps."""
    return _draw_panel(title, _panel_lines(names, events), METRICS, events.changes)


def _panel_lines(names: Sequence[str], events: Events) -> list[_Line]:
    lines = []
    for index, name in enumerate(names):
        spread = events.spread.get(name, ((), ()))
        lines.append(_Line(name, index, *map(tuple, events.series[name]), *map(tuple, spread)))
    return lines


def draw_run_curves(title: str, by_run: Mapping[str, Events]) -> Curve:
    """Draw one metric over steps with a line for each run; a run keeps its color if runs before it lack the metric."""
    lines = [
        _Line(run, index, *map(tuple, events.series[title]))
        for index, (run, events) in enumerate(by_run.items())
        if title in events.series
    ]
    return _draw_panel(title, lines, RUNS)


def _draw_panel(
    title: str, lines: Sequence[_Line], layout: Layout, changes: Mapping[float, str] = MappingProxyType({})
) -> Curve:
    drawing, reading = _draw_lines(title, tuple(lines), layout, tuple(changes))
    if changes:
        # The drawing is shared with other stages of equal numbers, and the texts are not.
        reading = {**reading, "changes": _change_marks(changes)}
    # Screen readers read the first and the last value of each line.
    texts = [f"{line.name} from {number(line.values[0])} to {number(line.values[-1])}" for line in lines]
    texts += [f"after step {step:g}: {text}" for step, text in changes.items()]
    return Curve(title, Panel.embed(drawing, f"{title} over steps: {', '.join(texts)}"), reading)


# A process that writes the page of a running run draws the curves of finished stages once.
@functools.lru_cache(maxsize=512)
@styled
def _draw_lines(
    title: str, lines: tuple[_Line, ...], layout: Layout, marks: tuple[float, ...]
) -> tuple[str, dict[str, Any]]:
    """Return the panel as an SVG file, with a vertical line at each of ``marks``, and its numbers."""
    panel = Panel(layout.width, layout.height, layout.axes_box)
    axes = panel.axes
    for line in lines:
        color = nth(COLORS, line.style)
        if line.low:
            axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.2, linewidth=0)
        axes.plot(
            line.steps,
            line.values,
            color=color,
            # The line styles shift each time the colors start over, so no two lines look alike.
            linestyle=nth(LINES, line.style + line.style // len(COLORS)),
            linewidth=layout.line_width,
            marker=nth(MARKERS, line.style) if len(line.steps) <= MAX_MARKERS else None,
            markersize=3.5,
            label=legend_name(line.name),
        )
    for step in marks:
        axes.axvline(step, color=INK, linestyle=":", linewidth=1.2)
    # Short tick labels fit into the fixed space beside the axes.
    set_short_ticks(axes)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", labelpad=1)
    axes.set_title(printable(title)[: layout.max_title], fontsize=9.5, loc="left", color=INK)
    numbers = [line.numbers() for line in lines]
    if layout is RUNS:
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7.5)
        # The script gives a line the color that it has in the drawing.
        numbers = [each | {"style": line.style} for each, line in zip(numbers, lines, strict=True)]
    elif len(lines) > 1:
        axes.legend(loc="best")
    drawing = panel.drawing()
    return drawing, _geometry(axes, layout) | {"lines": numbers}


def _geometry(axes: Any, layout: Layout) -> dict[str, Any]:
    """Return the axes' ``box`` in the SVG's points and their limits, by which the script finds a point."""
    start, bottom, box_width, box_height = layout.axes_box
    across = layout.width * POINTS_PER_INCH
    # matplotlib counts from the bottom, SVG from the top.
    down = layout.height * POINTS_PER_INCH
    return {
        "box": [start * across, (1 - bottom - box_height) * down, (start + box_width) * across, (1 - bottom) * down],
        "x": short_numbers(axes.get_xlim()),
        "y": short_numbers(axes.get_ylim()),
    }


def short_numbers(values: Sequence[float]) -> list[float]:
    """Return numbers with :data:`DIGITS` significant digits, which keeps thousands of them small as JSON."""
    numbers: list[float] = []
    for value in values:
        short = float(f"{value:.{DIGITS}g}")
        numbers.append(int(short) if short.is_integer() and abs(short) < 1e15 else short)
    return numbers
