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

    def add_rows(self, rows: Sequence[Sequence[int]], share: bool = True) -> list[list[int]]:
        """Append rows of tokens, and return for each row the index in the line of each of its tokens.

        With ``share`` a prefix of at least ``MIN_PREFIX`` tokens that several rows have in common is there once, at
        every level: a template's system message for all rows, a prompt for the answers to it.
        """
        indices: list[list[int]] = [[] for _ in rows]
        if share:
            self._add_branch(rows, indices, list(range(len(rows))), None)
            return indices
        for row, tokens in enumerate(rows):
            self._extend(indices, [row], tokens, None)
        return indices

    def _add_branch(
        self, rows: Sequence[Sequence[int]], indices: list[list[int]], members: list[int], parent: int | None
    ) -> None:
        """Append what the rows ``members`` have after the tokens that are placed, which they all share."""
        start = len(indices[members[0]])
        # 1. What all of them share becomes a segment, if it is long enough.
        end = _shared_length([rows[member] for member in members])
        if len(members) > 1 and end - start >= MIN_PREFIX:
            parent = self._extend(indices, members, rows[members[0]][start:end], parent)
            start = end
        # 2. Behind it they part by their next token.
        branches: dict[int | None, list[int]] = {}
        for member in members:
            next_token = rows[member][end] if end < len(rows[member]) else None
            branches.setdefault(next_token, []).append(member)
        # 3. Rows that go on together may share more; a single row ends with a segment of its own.
        for next_token, branch in branches.items():
            if len(branch) > 1 and next_token is not None:
                self._add_branch(rows, indices, branch, parent)
                continue
            for member in branch:
                if len(rows[member]) > start:
                    self._extend(indices, [member], rows[member][start:], parent)

    def _extend(
        self, indices: list[list[int]], members: Sequence[int], tokens: Sequence[int], parent: int | None
    ) -> int:
        """Append a segment that belongs to all rows ``members``; return its index."""
        segment = self.add(tokens, parent)
        places = range(self.starts[segment], self.starts[segment] + len(tokens))
        for member in members:
            indices[member] += places
        return segment

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
    length = min(_shared_length(rows), min(map(len, rows)) - 1)
    return length if length >= MIN_PREFIX else 0


def _shared_length(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that all rows share."""
    # In sorted order the first and the last row differ most: what these two share, all rows share.
    first, last = min(map(list, rows)), max(map(list, rows))
    limit = min(len(first), len(last))
    return next((index for index in range(limit) if first[index] != last[index]), limit)
