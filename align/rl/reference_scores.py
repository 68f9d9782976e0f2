"""Score the rows' own reference answers by the reward models of a stage, before the first update.

Other rewards are validated before a model is loaded (``align.evaluation.score_validation``).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from align.data.rows import Row
from align.data.scoring import WeightedSum
from align.errors import shorten
from align.evaluation.score_validation.probing import kind_of
from align.evaluation.score_validation.references import reference_of
from align.pipeline.context import StageContext

REFERENCE_ROWS = 32
"""Rows whose references are scored; few, because a reward model may be slow."""


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
            f"the reward model scores {self.scores[0]:g} for every reference answer and for an empty one, so it cannot "
            f"tell a right answer. Example: reference {shorten(repr(self.answers[0]))}. Train it again"
        )


def note_reference_scores(context: StageContext, scorer: WeightedSum | None, rows: Sequence[Row]) -> dict[str, float]:
    """Note how the reward models score the rows' references, and return the mean; warn if they reject them all.

    Nothing is scored in episodes, of which a reward model reads only the last turn.
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
    """Score the references of the first rows that have one; None without any, and without a reward model."""
    models = replace(scorer, parts=tuple(part for part in scorer.parts if kind_of(part) == "model"))
    references = [(row, reference_of(row)) for row in rows]
    referenced = [(row, answer) for row, answer in references if answer is not None][:REFERENCE_ROWS]
    if not models.parts or not referenced:
        return None
    scored_rows = [row for row, _ in referenced]
    answers = [answer for _, answer in referenced]
    are_finished = [False] * len(answers)
    return ReferenceScores(
        answers,
        list(map(float, models.score(scored_rows, answers, are_finished))),
        list(map(float, models.score(scored_rows, [""] * len(answers), are_finished))),
    )
