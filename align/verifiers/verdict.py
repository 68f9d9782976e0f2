"""The verdict of a verifier: a score with a reason, and the columns of a row that references come from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.validation import hint_nearest
from align.config.verifiers import FAILED
from align.data.rows import Row
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
PLACES = {
    "math": r"a box (\boxed{42}), ####, 'answer is', or an answer of one line",
    "number": r"a box (\boxed{42}), ####, or the last number of the answer",
    "choice": r"a box (\boxed{B}), ####, 'the answer is B', or a first or last line that is a letter",
}
"""Places of the answer, by verifier: each reads the first that a text has."""
WHOLE = {
    "exact": "compares the whole answer: ask for the answer and nothing else in the prompt",
    "contains": "looks for whole words in the answer: ask in the prompt for the words of the reference",
    "regex": "searches the whole answer: ask in the prompt for the form that it describes",
    "json_schema": "reads an answer that is JSON, or its only fenced block: ask for that in the prompt",
    "ifeval": "checks the whole answer: write the row's instructions in the prompt",
    "code": "runs the last block of Python, else the whole answer: ask for a block (```python) in the prompt",
    "criteria": "shows the whole answer to a judge: compare its reasons with the criteria",
}
"""Text that the other verifiers read, with what to do about answers in another form."""
LOW_SCORE = 0.05
"""Mean score up to which the reasons of a verifier are told. At least the remaining share must have a reason."""


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


def explain_low_scores(
    verifiers: Mapping[str, str], rates: Mapping[str, float], total: int, scores: Mapping[str, float]
) -> list[str]:
    """Return a sentence for each verifier that scores nearly all of ``total`` responses 0: its reasons, and a remedy.

    Args:
        verifiers: Kinds of verifiers by the name of their reward, which is empty for a score without parts.
        rates: Shares of the responses with a reason, as ``<reward>_<reason>``.
        total: Number of responses.
        scores: Mean scores of the rewards, as far as they are known.
    """
    lines = []
    for name, kind in verifiers.items():
        prefix = f"{name}_" if name else ""
        shares = {reason: rates.get(f"{prefix}{reason}", 0.0) for reason in REASONS}
        counts = {reason: round(share * total) for reason, share in shares.items() if share * total >= 0.5}
        # A score of 1/2 for half of the instructions has a reason as well, so the score also counts.
        if counts and sum(shares.values()) >= 1 - LOW_SCORE and scores.get(name, 0.0) <= LOW_SCORE:
            lines.append(explain_reasons(kind, counts, total))
    return lines


def explain_reasons(kind: str, counts: Mapping[str, int], total: int) -> str:
    """Return the reasons of a verifier for scores below 1, and what it reads: ``32 of 32: no_answer; `math` …``."""
    order = sorted(counts, key=lambda reason: -counts[reason])
    listed = ", ".join(f"{counts[reason]} of {total}: {reason}" for reason in order)
    return f"{listed}; `{kind}` {_remedy(kind, order)}"


def _remedy(kind: str, reasons: Sequence[str]) -> str:
    """Return what a verifier does with an answer, and what to do about the most frequent of ``reasons``."""
    if reasons[0] == TIMED_OUT:
        return "reached its limit of time: raise `seconds`, or use easier references"
    if reasons[0] == CRASHED and kind == "code":
        return "runs programs that end with an error: look at the samples, and at `packages` and `memory_mb`"
    if kind in PLACES and reasons[0] == UNEQUAL:
        return "read other answers than the references: look at the samples, and use easier prompts"
    if reasons[0] == NO_ANSWER and kind not in (*PLACES, "json_schema"):
        return "found empty answers: raise max_tokens, and look for thoughts that never end"
    return f"reads {PLACES[kind]}: ask for one of them in the prompt" if kind in PLACES else WHOLE[kind]


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
        names = sorted(shorten(str(name)) for name in row if row[name] not in (None, ""))
        raise UserError(
            f"{place}: row {row.get('id', '')} has no '{column}'.{hint_nearest(column, names)} A recipe keeps a column "
            f"with `keep`; the row has {', '.join(names)}."
        )
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}
