"""Score the rows' own reference answers before the first update: a reward that rejects them cannot teach the task.

Judges and other scorers that wait for a server are skipped, because their answers cost money or time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.data.rows import Row
from align.data.scoring import WeightedSum
from align.errors import shorten
from align.pipeline.context import StageContext

REFERENCE_ROWS = 32
"""Rows whose references are scored; few, because a reward may be slow."""


@dataclass(frozen=True)
class ReferenceScores:
    """Scores of the reference answers of some rows, and of an empty answer to each."""

    answers: list[str]
    scores: list[float]
    empty_scores: list[float]

    @property
    def mean(self) -> float:
        """Mean score of the references."""
        return statistics.fmean(self.scores)

    def describe(self) -> str:
        """Return a sentence for the stage's notes."""
        empty = statistics.fmean(self.empty_scores)
        return (
            f"the reference answers of {len(self.scores)} rows score {self.mean:.3g} on average "
            f"({min(self.scores):.3g} to {max(self.scores):.3g}), empty answers {empty:.3g}"
        )

    def warning(self) -> str | None:
        """Return a warning if the reward gives references and empty answers one and the same score, else None."""
        if len({*self.scores, *self.empty_scores}) > 1:
            return None
        return (
            f"the reward scores {self.scores[0]:g} for every reference answer and for an empty one, so it cannot tell "
            f"a right answer. Example: reference {shorten(repr(self.answers[0]))}. Check the column that it compares "
            "with, and how it reads the answer"
        )


def note_reference_scores(context: StageContext, scorer: WeightedSum | None, rows: Sequence[Row]) -> dict[str, float]:
    """Note how the rows' references score, and return their mean as a metric; warn if the reward rejects them all.

    Episodes are left to their environment, of which a reward reads only the last turn.
    """
    scored = None
    if scorer is not None and context.config.environment is None:
        scored = score_references(scorer, rows)
    if scored is None:
        return {}
    context.note(f"{context.name}: {scored.describe()}")
    warning = scored.warning()
    if warning is not None:
        context.warn(f"{context.name}: {warning}.")
    return {"reference_score": scored.mean}


def score_references(scorer: WeightedSum, rows: Sequence[Row]) -> ReferenceScores | None:
    """Score the references of the first rows that have one; None without any, and if all parts wait for servers."""
    local = replace(scorer, parts=tuple(part for part in scorer.parts if not getattr(part.scorer, "waits", False)))
    referenced = [(row, answer) for row in rows if (answer := reference_of(row))][:REFERENCE_ROWS]
    if not local.parts or not referenced:
        return None
    scored_rows = [row for row, _ in referenced]
    answers = [answer for _, answer in referenced]
    finished = [False] * len(answers)
    return ReferenceScores(
        answers,
        list(map(float, local.score(scored_rows, answers, finished))),
        list(map(float, local.score(scored_rows, [""] * len(answers), finished))),
    )


def reference_of(row: Row) -> str | None:
    """Return a row's reference answer: its completion, its better answer, or its column ``answer``."""
    for name in ("completion", "chosen"):
        messages: Any = row.get(name)
        if messages:
            return str(messages[-1].get("content") or "") or None
    answer = row.get("answer")
    return None if answer in (None, "") else str(answer)
