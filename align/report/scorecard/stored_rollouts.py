"""Stored rollouts on the page: a few responses of a stage, and the responses to held-out prompts by update.

A missing folder has no lines, and damaged files are skipped. Only the rows on the page are read as a whole. Torch-free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow.parquet as pq

from align.report.scorecard.rollouts import MAX_ROLLOUTS, Line, is_episode
from align.store.rollouts import rollout_files, rollout_rows

MAX_VALIDATIONS, MAX_FOLLOWED = 8, 4
"""Validations of a stage on the page, side by side, and held-out prompts."""
PLAIN_COLUMNS = (
    *("update", "prompt", "response", "score", "gold", "tokens", "finished", "kl"),
    *("thought_tokens", "thought_end", "open_thought"),
    *("messages", "calls", "turns", "turn_scores", "stop", "failure"),
)
"""Columns of stored rollouts that are fields of a line."""
PAGE_COLUMNS = (*PLAIN_COLUMNS, "scores", "token_texts", "token_kl", "values", "raw_advantages", "response_mask")

Entry = TypeVar("Entry")


def read_rollouts(folder: Path) -> list[Line]:
    """Return at most :data:`MAX_ROLLOUTS` stored rollouts of a stage, evenly from its first to its last update.

    The responses of an update to one prompt stay together. Only their rows are read.
    """
    rows = _StoredRows.read(folder, ("update", "round", "group"))
    groups = [range(start, min(end, start + MAX_ROLLOUTS)) for start, end in rows.runs]
    largest = max(map(len, groups), default=1)
    return rows.lines([row for group in _evenly(groups, MAX_ROLLOUTS // largest) for row in group])


def read_validations(folder: Path) -> list[list[Line]]:
    """Return the responses to the first held-out prompts of a stage, each in the order of the updates.

    At most :data:`MAX_VALIDATIONS` updates are read, evenly from the first to the last.
    """
    rows = _StoredRows.read(folder, ("update",))
    validations = [range(start, min(end, start + MAX_FOLLOWED)) for start, end in rows.runs]
    chosen = [row for validation in _evenly(validations, MAX_VALIDATIONS) for row in validation]
    by_prompt: dict[int, list[Line]] = {}
    # Every validation has the same prompts in the same order.
    for _, answers in groupby(rows.lines(chosen), lambda line: line["update"]):
        for index, line in enumerate(answers):
            line.pop("by_token", None)
            by_prompt.setdefault(index, []).append(line)
    return list(by_prompt.values())


@dataclass(frozen=True)
class _StoredRows:
    """Stored rollouts in the order of their files, numbered over all files; damaged files are skipped."""

    files: list[tuple[Path, int]]
    """Files, and the number of the first row of each."""
    runs: list[tuple[int, int]]
    """First and last row (exclusive) of consecutive rows with the same values."""

    @classmethod
    def read(cls, folder: Path, names: Sequence[str]) -> Self:
        """Read only the columns ``names``, and find the rows that follow each other with the same values."""
        files: list[tuple[Path, int]] = []
        parts: list[Any] = []
        count = 0
        for path in rollout_files(folder):
            try:
                table = pq.read_table(path, columns=list(names))
                parts.append(np.stack([table[name].to_numpy() for name in names]))
            except (OSError, ValueError, KeyError):  # pyarrow's errors are among these
                continue
            files.append((path, count))
            count += len(table)
        if not count:
            return cls([], [])
        values = np.concatenate(parts, axis=1)
        changes = np.flatnonzero((values[:, 1:] != values[:, :-1]).any(axis=0)) + 1
        edges = [0, *changes.tolist(), count]
        return cls(files, list(pairwise(edges)))

    def lines(self, rows: Sequence[int]) -> list[Line]:
        """Return the lines of rows in ascending order; only their files are read."""
        lines: list[Line] = []
        starts = [start for _, start in self.files]
        for place, group in groupby(rows, lambda row: bisect_right(starts, row) - 1):
            path, start = self.files[place]
            try:
                with pq.ParquetFile(path) as file:
                    names = [name for name in PAGE_COLUMNS if name in file.schema_arrow.names]
                    table = file.read(columns=names).take([row - start for row in group])
                    lines += [_line(row) for row in rollout_rows(table)]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
        return lines


def _line(row: Mapping[str, Any]) -> Line:
    """Return a stored response as a line: ``by_token`` has text, KL, value and advantage of each token."""
    line = {name: value for name, value in row.items() if name in PLAIN_COLUMNS and value is not None}
    line |= {f"score_{name}": value for name, value in (row.get("scores") or {}).items()}
    texts, divergences = row.get("token_texts"), row.get("token_kl")
    if texts and divergences:
        # A method without a critic has no values, and one that only selects has no advantages.
        zeros = [0.0] * len(texts)
        numbers = (divergences, row.get("values") or zeros, row.get("raw_advantages") or zeros)
        line["by_token"] = [list(token) for token in zip(texts, *numbers, strict=True)]
    if is_episode(line):
        line["sampled"] = row.get("response_mask")
    return line


def _evenly(entries: Sequence[Entry], count: int) -> list[Entry]:
    """Return at most ``count`` entries, evenly from the first to the last."""
    count = min(count, len(entries))
    return [entries[round(index * (len(entries) - 1) / max(1, count - 1))] for index in range(count)]
