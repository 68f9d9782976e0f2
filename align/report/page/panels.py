"""Figures as inline SVG: small panels that a page can lay out for any width.

Lines differ by marker and line style as well as by color. Matplotlib is imported only by the functions that draw. Its
SVG backend escapes text that comes from data, and never reads it as mathematics.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from markupsafe import Markup

from align.errors import printable

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""Okabe and Ito's palette, which color-blind readers can distinguish."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))
INK, GRID = "#3d4654", "#e3e6eb"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "align",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.size": 9,
    "axes.edgecolor": "#b8bfca",
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
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
        panel.axes.errorbar(
            estimate["value"],
            index,
            xerr=error_bars(estimate),
            marker=nth(MARKERS, index % 3),
            color=COLORS[0],
            markersize=6,
            capsize=2,
            linewidth=1.2,
        )
    if line is not None:
        panel.axes.axvline(line, color=INK, linestyle=":", linewidth=1.2)
    panel.name_rows([legend_name(name) for name, _ in rows])
    panel.axes.set_xlabel(xlabel)
    return panel.svg(label)


def legend_name(text: str) -> str:
    """Return a name as a legend shows it: printable and short.

    Matplotlib leaves labels that begin with ``_`` out of legends; such a name gets a leading space.
    """
    name = printable(text)
    if len(name) > MAX_NAME_LENGTH:
        name = f"{name[: MAX_NAME_LENGTH - 1]}…"
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
    """Return ``choices[index]``, starting over after the last one."""
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
