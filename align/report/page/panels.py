"""Figures as inline SVG: small panels that a page can lay out for any width, with ticks that a reader can count on.

Lines differ by marker and line style as well as by color. Ticks have steps of 1, 2 or 5 times a power of ten and labels
of one length. Matplotlib is imported only by the functions that draw. Its SVG backend escapes text that comes from
data, and never reads it as mathematics.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from align.errors import printable
from align.report.page.number_format import shorten

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""Okabe and Ito's palette, which color-blind readers can distinguish."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))
STYLE: dict[Any, Any] = json.loads(Path(__file__).with_name("style.json").read_text(encoding="utf-8"))
"""Settings of matplotlib."""
INK = STYLE["text.color"]
GRID = STYLE["grid.color"]
MAX_NAME_LENGTH = 32
PIXELS_PER_INCH = 96

Draw = TypeVar("Draw", bound=Callable[..., Any])


def styled(draw: Draw) -> Draw:
    """Decorate a function to draw with :data:`STYLE` and restore matplotlib's settings afterwards."""

    @functools.wraps(draw)
    def draw_styled(*arguments: Any, **options: Any) -> Any:
        from matplotlib import rc_context

        # The settings of matplotlib are global: a caller in the same process keeps its own.
        with rc_context(STYLE):
            return draw(*arguments, **options)

    return draw_styled  # type: ignore[return-value]


class Panel:
    """A figure with one pair of axes; ``svg()`` returns its markup. ``width`` and ``height`` are in inches."""

    svg_count = 0
    """Figures rendered for the current page; each id inside an SVG gets this number as its prefix."""

    def __init__(
        self, width: float = 3.9, height: float = 2.6, axes_box: tuple[float, float, float, float] | None = None
    ) -> None:
        """``axes_box`` (left, bottom, width, height, as shares) fixes the axes, which halves the drawing time."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), layout=None if axes_box else "constrained")
        FigureCanvasSVG(self.figure)
        self.axes = self.figure.add_axes(axes_box) if axes_box else self.figure.add_subplot()

    @classmethod
    def start_page(cls) -> None:
        """Number figures from 1 again, so a page does not depend on earlier pages."""
        cls.svg_count = 0

    def svg(self, label: str) -> Markup:
        """Return the figure as an ``<svg>`` element that scales with the page; screen readers read ``label``."""
        return Panel.embed(self.drawing(), label)

    def drawing(self) -> str:
        """Draw the figure and return it as an SVG file, for ``embed``."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    @staticmethod
    def embed(drawing: str, label: str) -> Markup:
        """Return a drawn figure as an element of the current page."""
        Panel.svg_count += 1
        return _embed(drawing, label, f"f{Panel.svg_count}-")

    def add_point(self, x: Any, y: Any, index: int = 0, **style: Any) -> None:
        """Draw the ``index``-th kind of point; ``x`` and ``y`` are numbers, or estimates with their 95 % intervals."""
        bars: dict[str, Any] = {}
        for name, estimate in (("xerr", x), ("yerr", y)):
            if isinstance(estimate, Mapping):
                bars[name] = error_bars(estimate)
        x_value, y_value = (estimate["value"] if isinstance(estimate, Mapping) else estimate for estimate in (x, y))
        look = {"marker": nth(MARKERS, index), "color": nth(COLORS, index), "markersize": 6, "capsize": 2}
        self.axes.errorbar(x_value, y_value, **bars, **look | {"linewidth": 1.2} | style)

    def name_rows(self, names: Sequence[str]) -> None:
        """Name the rows of a plot from top to bottom, without lines of the grid between them."""
        self.axes.set_yticks(range(len(names)), names)
        self.axes.set_ylim(len(names) - 0.5, -0.5)
        self.axes.grid(axis="y", visible=False)


@styled
def dots(rows: Sequence[tuple[str, Mapping[str, Any]]], xlabel: str, label: str, line: float | None = None) -> Markup:
    """Draw named estimates with 95 % intervals, a line for each; ``line`` marks a value such as chance."""
    panel = Panel(3.9, 0.75 + 0.27 * max(3, len(rows)))
    for index, (_, estimate) in enumerate(rows):
        if estimate["value"] is None:
            continue
        panel.add_point(estimate, index, index % 3, color=COLORS[0])
    if line is not None:
        panel.axes.axvline(line, color=INK, linestyle=":", linewidth=1.2)
    panel.name_rows([legend_name(name) for name, _ in rows])
    panel.axes.set_xlabel(xlabel)
    return panel.svg(label)


def legend_name(text: str, length: int = MAX_NAME_LENGTH) -> str:
    """Return a name as a legend shows it: printable, and at most ``length`` characters.

    Matplotlib leaves labels that begin with ``_`` out of legends; such a name gets a leading space.
    """
    name = shorten(printable(text), length)
    return f" {name}" if name.startswith("_") else name


def error_bars(estimate: Mapping[str, Any]) -> list[list[float]]:
    """Return the two arms of an interval, as matplotlib's ``yerr`` expects them; an unknown bound has length 0."""
    value = estimate["value"]
    low = value_or(estimate.get("low"), value)
    high = value_or(estimate.get("high"), value)
    # Rounding may put a bound beyond the value, and matplotlib refuses negative arms.
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def value_or(value: float | None, default: float) -> float:
    """Return ``value``, or ``default`` for None."""
    return default if value is None else value


def nth(choices: Sequence[Any], index: int) -> Any:
    """Return ``choices[index]``, starting over after the last choice."""
    return choices[index % len(choices)]


def standalone(svg: Markup) -> str:
    """Return a page's figure as an SVG file: with a size, a white background and the page's style for lines."""
    text = str(svg)
    head, _, rest = text.partition(">")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert box is not None
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'{head} width="{box[1]}pt" height="{box[2]}pt">'
        "<style>*{stroke-linejoin:round;stroke-linecap:butt}</style>"
        f'<rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'
    )


def _embed(text: str, label: str, prefix: str) -> Markup:
    """Return matplotlib's SVG file as an element of a page, with unique ids and its size from the view box."""
    from markupsafe import escape

    body = text[text.index("<svg") :]
    for part in ("<metadata>.*?</metadata>", "<!--.*?-->", "<style[^>]*>.*?</style>"):
        body = re.sub(part, "", body, flags=re.DOTALL)

    # Ids must be unique on the page: prefix each id and each reference to one, inside tags only.
    def prefix_ids(tag: re.Match[str]) -> str:
        return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0])

    # Truncate coordinates to a hundredth of a point, which is finer than any screen or printer.
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    body = re.sub(r"<[^<>]+>", prefix_ids, body)
    head, _, rest = body.partition(">")
    width = re.search(r'width="([\d.]+)pt"', head)
    box = re.search(r'viewBox="[^"]+"', head)
    assert width is not None and box is not None
    # The view box is in points of 1/72 inch, a page in pixels of 1/96 inch.
    pixels = round(float(width[1]) * PIXELS_PER_INCH / 72)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} '
        f'class="plot" style="max-width:{pixels}px" role="img" aria-label="{escape(printable(label))}">'
    )
    return Markup(opening + rest)  # noqa: S704  (written by matplotlib, which escapes text)


TICK_STEPS = (1, 2, 5, 10)
"""Steps between ticks, in powers of ten. Matplotlib also uses steps of 1.5, 2.5, 3, 4, 6 and 8."""
MAX_TICKS = 5
MIN_PLAIN = 0.01
MAX_PLAIN = 1e5
"""Axes whose largest number is outside this range have powers of ten on them."""
ROOT_TICKS = 7
"""Ticks that a root axis has room for."""


def set_short_ticks(axes: Any) -> None:
    """Give both axes few ticks with short labels, whole numbers across; call it once the limits are final."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    steps = list(TICK_STEPS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=steps, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=steps))
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        ticks = [float(tick) for tick in axis.get_major_locator().tick_values(low, high) if low <= tick <= high]
        labels = dict(zip(ticks, tick_labels(ticks), strict=True))
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda value, _, labels=labels: labels.get(value, "")))


def set_whole_ticks(axis: Any) -> None:
    """Give an axis of counts whole numbers, in steps of 1, 2 or 5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=list(TICK_STEPS), integer=True))


def set_root_ticks(axis: Any) -> None:
    """Give a root-scaled axis ticks that are evenly spread on paper, at 1, 2 or 5 times a power of ten."""
    from matplotlib.ticker import FuncFormatter, Locator

    class RootLocator(Locator):
        """Ticks for the limits that the axis has when it is drawn."""

        def __call__(self) -> list[float]:
            assert self.axis is not None
            return self.tick_values(*self.axis.get_view_interval())

        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            return root_ticks(vmin, vmax)

    axis.set_major_locator(RootLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the labels of evenly spaced ticks, all with the decimals that their step needs."""
    if not ticks:
        return []
    # All labels of an axis have the same form, which depends on its largest tick.
    if not MIN_PLAIN <= max(map(abs, ticks)) < MAX_PLAIN:
        return [_power_label(tick) for tick in ticks]
    step = min((after - before for before, after in itertools.pairwise(ticks)), default=abs(ticks[0]))
    # The margin keeps a step of 0.1 from looking like 0.0999.
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{tick + 0:.{decimals}f}".replace("-", "−") for tick in ticks]


def root_ticks(low: float, high: float) -> list[float]:
    """Return ticks between two limits of an axis with a signed root scale: 0, and each way out from it.

    Neighbors are at least a :data:`ROOT_TICKS`-th of the axis apart, as it is drawn.
    """
    gap = (_signed_root(high) - _signed_root(low)) / ROOT_TICKS
    ticks = [0.0] if low <= 0 <= high else []
    for sign in (1, -1):
        limit = sign * (high if sign > 0 else low)
        start = max(0.0, sign * (low if sign > 0 else high))
        last = math.sqrt(start) - (gap if start else 0.0)
        for value in _nice_values(limit):
            if value >= start and math.sqrt(value) - last >= gap:
                ticks.append(sign * value)
                last = math.sqrt(value)
    return sorted(ticks)


def _nice_values(limit: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten up to ``limit``, over four powers, ascending."""
    if limit <= 0:
        return []
    top = math.floor(math.log10(limit))
    # Below 1, divide by a power of ten instead of multiplying, which gives exactly 0.2.
    values = [
        factor * 10.0**power if power >= 0 else factor / 10.0**-power
        for power in range(top - 3, top + 1)
        for factor in (1, 2, 5)
    ]
    return [value for value in values if value <= limit]


def _signed_root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _power_label(value: float) -> str:
    """Return a tick's label with a power of ten, short enough for the fixed room to the left of the axes."""
    if not value:
        return "0"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}".replace("-", "−")
