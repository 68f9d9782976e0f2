"""The verdict of a verifier: a score with a reason, and the columns of a row that references come from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.data.rows import Row
from align.data.scoring import FAILED
from align.errors import UserError, shorten

NO_ANSWER = "no_answer"
UNPARSABLE = "unparsable"
UNEQUAL = "unequal"
TIMED_OUT = "timed_out"
CRASHED = "crashed"
REASONS = (NO_ANSWER, UNPARSABLE, UNEQUAL, TIMED_OUT, CRASHED)
"""Reasons of a score below 1: there is no answer, or several; it cannot be read; it is another answer than the
reference; the limit of time was reached; the program, or the process that compares, ended without a result."""


REPORTED = (*REASONS, FAILED)
"""Reasons that metrics of rewards may count: the verifiers' verdicts, and the failed calls of a function."""


@dataclass(frozen=True)
class Verdict:
    """A score from 0 to 1, and the reason if it is below 1."""

    score: float
    reason: str = ""


RIGHT = Verdict(1.0)


class BadReference(ValueError):
    """A reference that a verifier cannot read: a mistake in the data, not in the answer."""


def reasons_in(scores: Mapping[str, float]) -> dict[str, str]:
    """Return the reason of each reward that gave one: ``math_timed_out`` of 1 is ``{"math": "timed_out"}``."""
    reasons = {}
    for metric, value in scores.items():
        reason = next((reason for reason in REPORTED if metric == reason or metric.endswith(f"_{reason}")), "")
        if reason and value == 1:
            reasons[metric[: -len(reason)].rstrip("_") or "score"] = reason
    return reasons


def equal_or(is_right: bool) -> Verdict:
    """Return the verdict of a comparison."""
    return RIGHT if is_right else Verdict(0.0, UNEQUAL)


def reference_value(row: Row, column: str, place: str) -> Any:
    """Return a row's column, or with ``column.entry`` an entry of a column that holds a mapping or JSON text.

    Raises ``UserError``, which begins with ``place``, for a row without the value.
    """
    name, dot, entry = column.partition(".")
    # A column's own name may have a dot, so the complete name comes first.
    value = row.get(column)
    if value is None and dot:
        value = _mapping(row.get(name)).get(entry)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        columns = ", ".join(sorted(shorten(str(name)) for name in row if row[name] not in (None, "")))
        raise UserError(
            f"{place}: row {row.get('id', '')} has no '{column}'. A recipe keeps a column with `keep`; the row has "
            f"{columns}."
        )
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}
