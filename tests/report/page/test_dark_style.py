"""Figures carry their colors as styles, so the dark style sheet must know each of them."""

import pytest

from align.report.page.panels import COLORS, GRID, INK, STYLE
from align.report.page.templates import FOLDER

BRIGHT_ENOUGH = ("#CC79A7", "#E69F00", "#56B4E9")
"""Colors of the palette that need no other tone on dark paper."""


@pytest.mark.parametrize("color", [INK, GRID, STYLE["axes.edgecolor"], *COLORS])
def test_every_color_of_a_figure_has_a_dark_tone(color):
    text = (FOLDER / "dark.css").read_text()
    assert color in BRIGHT_ENOUGH or f"stroke: {color.lower()}" in text
