"""The score of a response in a pipeline: reward models, verifying functions, or a weighted sum of both.

Left out: penalties and normalization (``rewards.py``).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.data.scoring import Scorer
from align.rl.prompts import Row

Combination = Literal["mean", "minimum", "uncertainty"]
"""Combination of the scores of several reward models (arXiv 2310.02743): their mean; their minimum, so that a response
must satisfy all; or the mean minus ``weight`` times their variance."""

Parts = dict[str, list[float]]
"""Scores by the name of their part, in the order of the responses."""


@dataclass(frozen=True)
class RewardScorer:
    """Scores rows by an ``align.models.reward.RewardModel``. Prompts are rendered with the reward model's template."""

    model: Any

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Return one score per response; a truncated one is read without an end of turn."""
        finished = None if truncated is None else [not cut for cut in truncated]
        tools = [row.get("tools") for row in rows]
        scores: list[float] = self.model.score([row["prompt"] for row in rows], responses, finished, tools)
        return scores


@dataclass(frozen=True)
class Ensemble:
    """Combines several scorers. Where they disagree, their training data did not decide."""

    members: tuple[Scorer, ...]
    how: Combination
    weight: float = 1.0
    """Of the variance, for ``uncertainty``."""

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Return one score per response."""
        return self.score_parts(rows, responses, truncated)[""]

    def score_parts(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> Parts:
        """Return the combined scores under ``""`` and the members' standard deviation under ``spread``."""
        by_member = [scorer.score(rows, responses, truncated) for scorer in self.members]
        by_response = list(zip(*by_member, strict=True))
        combined = [combine(scores, self.how, self.weight) for scores in by_response]
        return {"": combined, "spread": [statistics.pstdev(scores) for scores in by_response]}


def combine(scores: Sequence[float], how: Combination, weight: float) -> float:
    """Return one score from several of the same response; the variance is the population's."""
    if how == "minimum":
        return min(scores)
    mean = statistics.fmean(scores)
    if how == "uncertainty":
        return mean - weight * statistics.pvariance(scores)
    return mean


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
        """Return one score per response."""
        return self.score_parts(rows, responses, truncated)[""]

    def score_parts(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> Parts:
        """Return the sum under ``""``, each part's unweighted scores under its name, and an ensemble's ``name_spread``.

        The scores of a single part are the sum, and are not repeated.
        """
        totals = [0.0] * len(responses)
        parts: Parts = {"": totals}
        for part in self.parts:
            scores, components = _scores_of(part.scorer, rows, responses, truncated)
            for index, score in enumerate(scores):
                totals[index] += part.weight * score
            if len(self.parts) > 1:
                parts[part.name] = scores
            parts |= {f"{part.name}_{name}": values for name, values in components.items()}
        return parts


def _scores_of(
    scorer: Scorer | Ensemble, rows: list[Row], responses: list[str], truncated: list[bool] | None
) -> tuple[list[float], Parts]:
    if isinstance(scorer, Ensemble):
        parts = scorer.score_parts(rows, responses, truncated)
        return parts.pop(""), parts
    return scorer.score(rows, responses, truncated), {}
