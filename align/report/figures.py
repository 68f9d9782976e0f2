"""Figures as inline SVG: small panels that a page can lay out for any width, told apart by marker and line style.

Matplotlib is imported by the functions that draw. Text that comes from data is escaped by the SVG backend and is
never read as mathematics. Leaves out what a figure means: captions are the page's.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from markupsafe import Markup

from align.errors import printable

# Okabe and Ito's colors, which color-blind readers can tell apart; shape and line style repeat what color says.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
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


LONGEST_NAME = 32
PIXELS_PER_INCH = 96


Draw = TypeVar("Draw", bound=Callable[..., Any])


def styled(draw: Draw) -> Draw:
    """Draw with :data:`STYLE`, and leave the process's own settings as they were."""

    @functools.wraps(draw)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*arguments, **options)

    return wrapped  # type: ignore[return-value]


class Panel:
    """One figure of one pair of axes; ``svg()`` gives its markup. ``width`` and ``height`` are in inches."""

    made = 0

    def __init__(
        self, width: float = 3.9, height: float = 2.6, place: tuple[float, float, float, float] | None = None
    ) -> None:
        """``place`` (left, bottom, width, height, as shares) fixes the axes; laying them out takes half the time."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), layout=None if place else "constrained")
        FigureCanvasSVG(self.figure)
        self.axes = self.figure.add_axes(place) if place else self.figure.add_subplot()

    def svg(self, label: str) -> Markup:
        """The figure as an ``<svg>`` element that scales with the page; ``label`` is what a screen reader says."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        Panel.made += 1
        return _embed(buffer.getvalue(), label, f"f{Panel.made}-")


@styled
def dots(rows: Sequence[tuple[str, Mapping[str, Any]]], xlabel: str, label: str, line: float | None = None) -> Markup:
    """Named estimates with 95 % intervals, one a line; ``line`` marks a value such as chance."""
    panel = Panel(3.9, 0.75 + 0.27 * max(3, len(rows)))
    for place, (_, estimate) in enumerate(rows):
        if estimate["value"] is None:
            continue
        panel.axes.errorbar(
            estimate["value"], place, xerr=bars(estimate), marker=nth(MARKERS, place % 3), color=COLORS[0],
            markersize=6, capsize=2, linewidth=1.2,
        )  # fmt: skip
    if line is not None:
        panel.axes.axvline(line, color=INK, linestyle=":", linewidth=1.2)
    panel.axes.set_yticks(range(len(rows)), [legend_name(name) for name, _ in rows])
    panel.axes.set_ylim(len(rows) - 0.5, -0.5)
    panel.axes.grid(axis="y", visible=False)
    panel.axes.set_xlabel(xlabel)
    return panel.svg(label)


def legend_name(text: str) -> str:
    """A name as labels have it: visible, short, and not beginning as matplotlib's hidden labels do."""
    shown = printable(text)
    shown = shown if len(shown) <= LONGEST_NAME else f"{shown[: LONGEST_NAME - 1]}…"
    return f" {shown}" if shown.startswith("_") else shown


def bars(estimate: Mapping[str, Any]) -> list[list[float]]:
    """Lengths of an interval's two arms, as matplotlib wants them; none where a bound is not known."""
    value = estimate["value"]
    low, high = either(estimate.get("low"), value), either(estimate.get("high"), value)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def either(value: float | None, other: float) -> float:
    """``value``, or ``other`` where there is none."""
    return other if value is None else value


def nth(choices: Sequence[Any], index: int) -> Any:
    """The choice at ``index``, from the start again after the last."""
    return choices[index % len(choices)]


def standalone(svg: Markup) -> str:
    """A figure of the page as a file of its own: with a size, a white ground, and what the page's style does for it."""
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
    """A file of SVG as an element of a page: no prologue, no metadata, ids of its own, size from the view box."""
    from markupsafe import escape

    body = text[text.index("<svg") :]
    for part in ("<metadata>.*?</metadata>", "<!--.*?-->", "<style[^>]*>.*?</style>"):
        body = re.sub(part, "", body, flags=re.DOTALL)

    def own_ids(tag: re.Match[str]) -> str:
        return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0])

    # a hundredth of a point is finer than any screen or printer
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    body = re.sub(r"<[^<>]+>", own_ids, body)
    head, _, rest = body.partition(">")
    width = re.search(r'width="([\d.]+)pt"', head)
    box = re.search(r'viewBox="[^"]+"', head)
    assert width is not None and box is not None
    pixels = round(float(width[1]) * PIXELS_PER_INCH / 72)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} '
        f'class="plot" style="max-width:{pixels}px" role="img" aria-label="{escape(printable(label))}">'
    )
    return Markup(opening + rest)  # noqa: S704  (written by matplotlib, which escapes text)
