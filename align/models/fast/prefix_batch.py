"""Build one row of tokens from segments that may share a prefix.

A chat template opens every conversation with the same system message, and the responses to one prompt share that whole
prompt. A causal model computes the same states for these tokens whatever follows, so the row holds them once
(``ragged_rows.make_layout``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align.models.fast.ragged_rows import make_layout

MIN_PREFIX = 8
"""Common tokens from which a prefix is worth a segment of its own."""


class PrefixBatch:
    """Segments of tokens, concatenated into one row. A segment may continue an earlier one, its parent."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.lengths: list[int] = []
        self.starts: list[int] = []
        """Offset of each segment in the row."""
        self._parents: list[int | None] = []
        self._positions: list[int] = []

    def add(self, tokens: Sequence[int], parent: int | None = None) -> int:
        """Append a segment that continues ``parent`` (None: a sequence of its own) and return its index."""
        first_position = 0
        if parent is not None:
            last_of_parent = self.starts[parent] + self.lengths[parent] - 1
            first_position = self._positions[last_of_parent] + 1
        self._positions += range(first_position, first_position + len(tokens))
        self.starts.append(len(self.tokens))
        self.lengths.append(len(tokens))
        self._parents.append(parent)
        self.tokens += tokens
        return len(self.lengths) - 1

    def batch(self) -> dict[str, Any]:
        """Return ``input_ids`` and ``position_ids``, both (1, N), and their attention ``layout``."""
        return {
            "input_ids": torch.tensor([self.tokens]),
            "position_ids": torch.tensor([self._positions]),
            "layout": make_layout(self.lengths, self._parents),
        }


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return the length of the prefix that all rows share; 0 for one row or a prefix below ``MIN_PREFIX``.

    Every row keeps at least one token after the prefix.
    """
    if len(rows) < 2:
        return 0
    # In sorted order the first and the last row differ most: what these two share, all rows share.
    first, *_, last = sorted(map(list, rows))
    limit = min(map(len, rows)) - 1
    length = next((index for index in range(limit) if first[index] != last[index]), limit)
    return length if length >= MIN_PREFIX else 0
