"""One line of tokens for a model to read, put together from pieces that may go on from the same beginning.

A chat template opens every conversation with the same system message, and responses to one prompt share it whole.
Causal models have the same states there whatever follows, so such tokens stand in the line once (``ragged.lay_out``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align.models.fast.ragged_rows import lay_out

WORTHWHILE = 8
"""Tokens in common from which a beginning gets a piece of its own."""


class Line:
    """Pieces of tokens, one behind the other."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.lengths: list[int] = []
        self.starts: list[int] = []
        """Where in the line each piece begins."""
        self._parents: list[int | None] = []
        self._places: list[int] = []

    def add(self, tokens: Sequence[int], parent: int | None = None) -> int:
        """A piece that goes on from ``parent``, or from nothing; its number."""
        begin = 0 if parent is None else self._places[self.starts[parent] + self.lengths[parent] - 1] + 1
        self._places += range(begin, begin + len(tokens))
        self.starts.append(len(self.tokens))
        self.lengths.append(len(tokens))
        self._parents.append(parent)
        self.tokens += tokens
        return len(self.lengths) - 1

    def batch(self) -> dict[str, Any]:
        """``input_ids`` and ``position_ids`` (1, N), and their ``layout``."""
        return {
            "input_ids": torch.tensor([self.tokens]),
            "position_ids": torch.tensor([self._places]),
            "layout": lay_out(self.lengths, self._parents),
        }


def in_common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all of several rows begin with, of which each keeps one more; 0 where that is not worthwhile."""
    if len(rows) < 2:
        return 0
    first, *_, last = sorted(map(list, rows))  # what these two share, all between them do
    most = min(map(len, rows)) - 1
    count = next((at for at in range(most) if first[at] != last[at]), most)
    return count if count >= WORTHWHILE else 0
