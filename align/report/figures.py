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

from align.report.escape import visible

# Okabe and Ito's colours, which colour-blind readers can tell apart; shape and line style repeat what colour says.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
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

    def __init__(self, width: float = 3.9, height: float = 2.6) -> None:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(self.figure)
        self.axes = self.figure.add_subplot()

    def svg(self, label: str) -> Markup:
        """The figure as an ``<svg>`` element that scales with the page; ``label`` is what a screen reader says."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        Panel.made += 1
        return _embed(buffer.getvalue(), label, f"f{Panel.made}-")


@styled
def reward_against_kl(card: Mapping[str, Any], metric: str) -> Markup:
    """One point per checkpoint: KL to the reference (nats) across, a score up, 95 % intervals on both."""
    panel = Panel()
    for index, policy in enumerate(card["policies"]):
        own = card["estimates"][policy]
        if "kl" not in own or metric not in own:
            continue
        x, y = own["kl"], own[metric]
        panel.axes.errorbar(
            x["value"], y["value"], xerr=_bars(x), yerr=_bars(y), marker=_of(MARKERS, index), color=_of(COLOURS, index),
            markersize=7, markeredgecolor="white", capsize=2, linewidth=1.2, linestyle="none", label=visible(policy),
        )  # fmt: skip
    # Reward moves with the root of KL (arXiv 2210.10760), and a base model may be far to the right of all others.
    panel.axes.set_xscale("function", functions=(_signed_root, _signed_square))
    panel.axes.set_xlabel(f"KL to {visible(card['reference'])} (nats per response, root scale)")
    panel.axes.set_ylabel(card["metrics"][metric]["title"])
    panel.axes.margins(0.12)
    panel.axes.legend(loc="best")
    return panel.svg(f"{card['metrics'][metric]['title']} against KL to {card['reference']}, one point per checkpoint")


@styled
def by_family(card: Mapping[str, Any], metric: str, most: int = 30) -> Markup | None:
    """The metric of every checkpoint in each source, 95 % intervals; the ``most`` largest sources."""
    families = sorted(card["families"].items(), key=lambda item: -item[1]["n"])[:most]
    families = [(name, family) for name, family in sorted(families) if family["estimates"]]
    if not families:
        return None
    policies = card["policies"]
    panel = Panel(8.0, 0.9 + 0.18 * len(families) * max(2, len(policies)) * 0.62)
    step = 0.7 / max(1, len(policies))
    for index, policy in enumerate(policies):
        rows = [
            (place + (index - (len(policies) - 1) / 2) * step, family["estimates"][policy].get(metric))
            for place, (_, family) in enumerate(families)
        ]
        rows = [(y, estimate) for y, estimate in rows if estimate is not None and estimate["value"] is not None]
        for y, estimate in rows:
            panel.axes.plot(
                [_or(estimate["low"], estimate["value"]), _or(estimate["high"], estimate["value"])], [y, y],
                color=_of(COLOURS, index), linewidth=1.1, alpha=0.7,
            )  # fmt: skip
        panel.axes.plot(
            [estimate["value"] for _, estimate in rows], [y for y, _ in rows], linestyle="none",
            marker=_of(MARKERS, index), color=_of(COLOURS, index), markersize=5, label=visible(policy),
        )  # fmt: skip
    panel.axes.set_yticks(range(len(families)), [f"{visible(name)[:40]}  (n={f['n']})" for name, f in families])
    panel.axes.set_ylim(len(families) - 0.5, -0.5)
    panel.axes.grid(axis="y", visible=False)
    for place in range(1, len(families)):
        panel.axes.axhline(place - 0.5, color=GRID, linewidth=0.8)
    panel.axes.set_xlabel(card["metrics"][metric]["title"])
    panel.figure.legend(loc="outside upper center", ncols=min(6, len(policies)))
    return panel.svg(f"{card['metrics'][metric]['title']} of each checkpoint by source")


@styled
def length_histogram(lengths: Mapping[str, Sequence[int]]) -> Markup:
    """Share of responses by length in tokens, one outline per checkpoint."""
    import numpy as np

    panel = Panel()
    longest = max((max(values, default=1) for values in lengths.values()), default=1)
    edges = np.linspace(0, longest + 1, min(24, longest + 1) + 1)
    for index, (policy, values) in enumerate(lengths.items()):
        if not values:
            continue
        counts, _ = np.histogram(values, edges)
        panel.axes.stairs(
            counts / len(values), edges, color=_of(COLOURS, index), linestyle=_of(LINES, index), linewidth=1.6,
            label=visible(policy),
        )  # fmt: skip
    panel.axes.set_xlabel("tokens of a response")
    panel.axes.set_ylabel("share of responses")
    panel.axes.legend(loc="best")
    return panel.svg("Distribution of response lengths of each checkpoint")


@styled
def dots(rows: Sequence[tuple[str, Mapping[str, Any]]], xlabel: str, label: str, line: float | None = None) -> Markup:
    """Named estimates with 95 % intervals, one a line; ``line`` marks a value such as chance."""
    panel = Panel(3.9, 0.75 + 0.27 * max(3, len(rows)))
    for place, (_, estimate) in enumerate(rows):
        panel.axes.errorbar(
            estimate["value"], place, xerr=_bars(estimate), marker=_of(MARKERS, place % 3), color=COLOURS[0],
            markersize=6, capsize=2, linewidth=1.2,
        )  # fmt: skip
    if line is not None:
        panel.axes.axvline(line, color=INK, linestyle=":", linewidth=1.2)
    panel.axes.set_yticks(range(len(rows)), [visible(name)[:32] for name, _ in rows])
    panel.axes.set_ylim(len(rows) - 0.5, -0.5)
    panel.axes.grid(axis="y", visible=False)
    panel.axes.set_xlabel(xlabel)
    return panel.svg(label)


@styled
def curve(title: str, names: Sequence[str], series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Markup:
    """One panel of a stage's curves: ``names`` (training, then held out) over optimizer steps."""
    from matplotlib.ticker import MaxNLocator

    panel = Panel(3.0, 1.95)
    for index, name in enumerate(names):
        steps, values = series[name]
        few = len(steps) <= 20
        panel.axes.plot(
            steps, values, color=_of(COLOURS, index), linestyle=_of(LINES, index),
            marker=_of(MARKERS, index) if few else None, markersize=3.5, label=visible(name),
        )  # fmt: skip
    panel.axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    panel.axes.set_xlabel("step")
    panel.axes.set_title(visible(title)[:44], fontsize=9.5, loc="left", color=INK)
    if len(names) > 1:
        panel.axes.legend(loc="best")
    return panel.svg(f"{title} over steps")


def _signed_root(x: Any) -> Any:
    """Square root that keeps the sign: an estimate of a small KL may be negative."""
    import numpy as np

    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> Any:
    import numpy as np

    return np.sign(x) * np.square(x)


def _bars(estimate: Mapping[str, Any]) -> list[list[float]]:
    """Lengths of an interval's two arms, as matplotlib wants them."""
    value = estimate["value"]
    low, high = _or(estimate.get("low"), value), _or(estimate.get("high"), value)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _of(choices: Sequence[Any], index: int) -> Any:
    return choices[index % len(choices)]


def _embed(text: str, label: str, prefix: str) -> Markup:
    """A file of SVG as an element of a page: no prologue, no metadata, ids of its own, size from the view box."""
    from markupsafe import escape

    body = text[text.index("<svg") :]
    for part in ("<metadata>.*?</metadata>", "<!--.*?-->", "<style[^>]*>.*?</style>"):
        body = re.sub(part, "", body, flags=re.DOTALL)

    def own_ids(tag: re.Match[str]) -> str:
        return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0])

    body = re.sub(r"<[^<>]+>", own_ids, body)
    head, _, rest = body.partition(">")
    width = re.search(r'width="([\d.]+)pt"', head)
    box = re.search(r'viewBox="[^"]+"', head)
    assert width is not None and box is not None
    pixels = round(float(width[1]) * 4 / 3)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} '
        f'class="plot" style="max-width:{pixels}px" role="img" aria-label="{escape(visible(label))}">'
    )
    return Markup(opening + rest)  # noqa: S704  (written by matplotlib, which escapes text)
