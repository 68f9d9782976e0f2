"""Filter by a Python function of one's own, named by import path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from align.data.rows import Dropped, Row
from align.errors import UserError
from align.pipeline.registry import load_object


class PredicateFilter:
    """Keeps rows for which a function returns True or None.

    The function gets the row (a copy, so that it cannot change it) and returns True or None to keep it, or False or a
    reason to drop it. The answer must depend on the row alone.
    """

    def __init__(self, path: str) -> None:
        found = load_object(path)
        if not callable(found):
            raise UserError(f"where '{path}': holds {type(found).__name__}, expected a function of one row.")
        self._path = path
        self._function: Callable[[Row], Any] = found

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """One result a row. Raises ``UserError``, with the row's place, when the function raises or answers oddly."""
        return [self._judge(row) or row for row in rows]

    def _judge(self, row: Row) -> Dropped | None:
        place = f"{row.get('_where') or 'row'} (id {row.get('id')})"
        try:
            answer = self._function(copy.deepcopy(row))
        except Exception as error:
            raise UserError(f"{place}: where '{self._path}' raised {type(error).__name__}: {error}") from error
        if isinstance(answer, np.bool_):
            answer = bool(answer)
        if answer is True or answer is None:
            return None
        if answer is False:
            return Dropped(f"filter: {self._path}")
        if isinstance(answer, str) and answer.strip():
            return Dropped(f"filter: {' '.join(answer.split())[:100]}", {"where": self._path})
        raise UserError(
            f"{place}: where '{self._path}' returned {answer!r}; expected True or None to keep the row, False or a "
            "reason (text) to drop it."
        )
