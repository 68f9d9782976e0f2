"""Figures: ticks that a reader can count on, and a dark tone for each color."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from align.report.page.curve_panels import draw_curve
from align.report.page.metric_series import Events
from align.report.page.panels import COLORS, GRID, INK, ROOT_TICKS, STYLE, root_ticks, tick_labels
from align.report.page.templates import FOLDER


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([4.4, 4.6, 5.0], ["4.4", "4.6", "5.0"]),
        ([0.0, 0.02, 0.04], ["0.00", "0.02", "0.04"]),
        ([-0.1, -0.0, 0.1], ["−0.1", "0.0", "0.1"]),
        ([0.0, 5.0, 10.0], ["0", "5", "10"]),
        ([0.0, 0.0005, 0.001, 0.0015], ["0", "5e−4", "1e−3", "1.5e−3"]),
        ([-3e6, 0.0], ["−3e6", "0"]),
        ([7.0], ["7"]),
        ([], []),
    ],
)
def test_labels_have_the_decimals_of_their_step(ticks, labels):
    assert tick_labels(ticks) == labels


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (-1.0, 24.0, [-1.0, 0.0, 1.0, 5.0, 10.0, 20.0]),
        (0.0, 0.6, [0.0, 0.02, 0.1, 0.2, 0.5]),
        (9.0, 100.0, [10.0, 20.0, 50.0, 100.0]),
        (0.0, 0.0, [0.0]),
    ],
)
def test_root_ticks_are_spread_on_paper(low, high, ticks):
    assert root_ticks(low, high) == ticks
    roots = [math.copysign(math.sqrt(abs(tick)), tick) for tick in ticks]
    span = math.sqrt(high) + math.sqrt(-low) if low < 0 else math.sqrt(high) - math.sqrt(low)
    assert all(after - before >= span / ROOT_TICKS - 1e-9 for before, after in itertools.pairwise(roots))


@pytest.mark.parametrize("values", [[0.4, 3.97], [0.504, 0.531], [0.0, 0.035], [0.1, 0.1], [0.0, 3e-3], [-7.0, 4e5]])
def test_curves_step_by_one_two_or_five(values):
    curve = draw_curve("loss", ["loss"], Events({"loss": ([0.0, 19.0], values)}))
    texts = [text.replace("−", "-") for text in re.findall(r"<text[^>]*>([^<]+)</text>", curve.svg)]
    numbers = [float(text) for text in texts if re.fullmatch(r"-?[\d.]+(e-?\d+)?", text)]
    steps = {0, 5, 10, 15}
    assert steps <= set(numbers[: len(steps)])
    up = numbers[len(steps) :]
    assert 2 <= len(up) <= 6
    for before, after in itertools.pairwise(up):
        step = after - before
        assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


BRIGHT_ENOUGH = ("#CC79A7", "#E69F00", "#56B4E9")
"""Colors of the palette that need no other tone on dark paper."""


@pytest.mark.parametrize("color", [INK, GRID, STYLE["axes.edgecolor"], *COLORS])
def test_every_color_of_a_figure_has_a_dark_tone(color):
    text = (FOLDER / "dark.css").read_text()
    assert color in BRIGHT_ENOUGH or f"stroke: {color.lower()}" in text
