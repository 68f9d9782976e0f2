"""The ``divide`` step: long documents in pieces, cut at the end of a paragraph, a line or a word.

For a book in one file, which is one document and cannot be split into training and test, and for the search for
near-duplicates, which compares full texts. Documents that only have to fit a model's context need no such step:
``pretrain`` reads them in windows. Not implemented: overlap between pieces, and headings. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

from align.config.recipe.step_settings import DivideStep
from align.data.rows import Row
from align.data.steps.base import StepContext

SEPARATORS = ("\n\n", "\n", " ")
"""Texts to cut at, the best first; a cut lies in the second half of a piece."""


class Divide:
    """Replaces a long text by rows with its pieces."""

    def __init__(self, config: DivideStep, context: StepContext) -> None:
        self.characters = config.characters

    def apply(self, rows: list[Row]) -> Sequence[Row | list[Row]]:
        """Return each row, or the rows with its pieces."""
        return [self._divide(row) for row in rows]

    def _divide(self, row: Row) -> Row | list[Row]:
        if len(row["text"]) <= self.characters:
            return row
        return [row | {"text": piece} for piece in divide_text(row["text"], self.characters)]


def divide_text(text: str, characters: int) -> list[str]:
    """Return pieces of at most ``characters`` characters, unchanged but for the separator at each cut.

    Indentation stays, so that code is code in every piece. Pieces of white space alone are dropped.
    """
    pieces = []
    while len(text) > characters:
        cut, width = _find_cut(text, characters)
        pieces.append(text[:cut])
        text = text[cut + width :]
    return [piece for piece in (*pieces, text) if piece.strip()]


def _find_cut(text: str, characters: int) -> tuple[int, int]:
    """Return the place of the best separator and its length; without one, cut after ``characters`` characters."""
    for separator in SEPARATORS:
        # From the middle on, so that pieces do not become short. The separator itself may lie behind the limit.
        place = text.rfind(separator, characters // 2, characters + 1)
        if place > 0:
            return place, len(separator)
    return characters, 0
