"""The score of a response in a pipeline: reward models, verifiable functions, or a weighted sum of both.

Left out: penalties and normalization of scores (``rewards.py``, ``normalize.py``).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.data.scoring import Scorer
from align.rl.prompts import Row

Combination = Literal["mean", "minimum", "uncertainty"]
"""How the scores of several reward models become one (arXiv 2310.02743): their mean; the lowest, so that a response
must please all; or the mean less ``weight`` times their variance."""

Parts = dict[str, list[float]]
"""Scores by the name of what gave them, in the order of the responses."""


@dataclass(frozen=True)
class RewardScorer:
    """``align.models.reward.RewardModel`` on rows. Prompts are rendered anew with the reward model's own template."""

    model: Any

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """One score per response; a truncated one is read without an end of turn."""
        finished = None if truncated is None else [not cut for cut in truncated]
        tools = [row.get("tools") for row in rows]
        scores: list[float] = self.model.score([row["prompt"] for row in rows], responses, finished, tools)
        return scores


@dataclass(frozen=True)
class Ensemble:
    """Several scorers of the same thing as one: where they disagree, no training pair has said who is right."""

    members: tuple[Scorer, ...]
    how: Combination
    weight: float = 1.0
    """Of the variance, for ``uncertainty``."""

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """One score per response."""
        return self.score_parts(rows, responses, truncated)[""]

    def score_parts(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> Parts:
        """The combined score under ``""`` and the members' standard deviation under ``spread``."""
        every = [scorer.score(rows, responses, truncated) for scorer in self.members]
        by_response = list(zip(*every, strict=True))
        combined = [combine(scores, self.how, self.weight) for scores in by_response]
        return {"": combined, "spread": [statistics.pstdev(scores) for scores in by_response]}


def combine(scores: Sequence[float], how: Combination, weight: float) -> float:
    """One score from several of the same response; the variance is the population's."""
    if how == "minimum":
        return min(scores)
    mean = statistics.fmean(scores)
    return mean - weight * statistics.pvariance(scores) if how == "uncertainty" else mean


@dataclass(frozen=True)
class Part:
    """One term of a sum of scores."""

    name: str
    weight: float
    scorer: Scorer | Ensemble


@dataclass(frozen=True)
class WeightedSum:
    """The sum of ``weight * score`` over ``parts``."""

    parts: tuple[Part, ...]

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """One score per response."""
        return self.score_parts(rows, responses, truncated)[""]

    def score_parts(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> Parts:
        """The sum under ``""``, each part's unweighted scores under its name, an ensemble's under ``name_spread`` too.

        A single plain part is the sum, and is not repeated.
        """
        totals = [0.0] * len(responses)
        found: Parts = {"": totals}
        for part in self.parts:
            scores, more = _scores_of(part.scorer, rows, responses, truncated)
            for index, score in enumerate(scores):
                totals[index] += part.weight * score
            if len(self.parts) > 1:
                found[part.name] = scores
            found |= {f"{part.name}_{name}": values for name, values in more.items()}
        return found


def _scores_of(
    scorer: Scorer | Ensemble, rows: list[Row], responses: list[str], truncated: list[bool] | None
) -> tuple[list[float], Parts]:
    if isinstance(scorer, Ensemble):
        parts = scorer.score_parts(rows, responses, truncated)
        return parts.pop(""), parts
    return scorer.score(rows, responses, truncated), {}
