"""The ``divide`` step: long documents in pieces, cut where a paragraph, a line or a word ends.

For one book in one file, which is one document and cannot be split into training and test, and for near-duplicates,
which compare whole texts. Documents that only have to fit a model's context need no such step: ``pretrain`` reads
them in windows. Torch-free. Left out: overlap, and headings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from align.data.rows import Row
from align.data.steps.base import RowStep, StepConfig, StepContext

ENDS = ("\n\n", "\n", " ")
"""Where a cut may be, the best first; a cut lies in the second half of a piece."""


class DivideStep(StepConfig):
    """Cut every text into pieces; each becomes a row of its own."""

    type: Literal["divide"]
    characters: int = Field(ge=100)
    """Most characters of a piece."""

    def start(self, context: StepContext) -> RowStep:
        """The step itself."""
        return _Divide(self.characters)


class _Divide:
    def __init__(self, most: int) -> None:
        self.most = most

    def apply(self, rows: list[Row]) -> Sequence[Row | list[Row]]:
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row | list[Row]:
        if len(row["text"]) <= self.most:
            return row
        return [row | {"text": piece} for piece in divided(row["text"], self.most)]


def divided(text: str, most: int) -> list[str]:
    """Pieces of at most ``most`` characters, as they stand in the text but for the sign that each cut is made at.

    Indentation stays, so that code is code in every piece. Pieces of white space alone are left out.
    """
    pieces = []
    while len(text) > most:
        places = ((text.rfind(sign, most // 2, most + 1), len(sign)) for sign in ENDS)
        cut, width = next(((place, width) for place, width in places if place > 0), (most, 0))
        pieces.append(text[:cut])
        text = text[cut + width :]
    return [piece for piece in (*pieces, text) if piece.strip()]
