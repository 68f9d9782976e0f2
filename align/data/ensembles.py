"""Reward models as scorers: one, or several whose scores are combined. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.data.rows import Row
from align.data.scoring import Parts, Scorer

Combination = Literal["mean", "minimum", "uncertainty"]
"""Combination of the scores of several reward models (arXiv 2310.02743): their mean; their minimum, so a response
must satisfy all; or the mean minus ``weight`` times their variance."""


@dataclass(frozen=True)
class RewardScorer:
    """Scores rows by an ``align.models.reward.RewardModel``. Prompts are rendered with the reward model's template."""

    model: Any

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Return one score per response; a truncated one is read without an end of turn."""
        are_finished = None if truncated is None else [not cut for cut in truncated]
        tools = [row.get("tools") for row in rows]
        scores: list[float] = self.model.score([row["prompt"] for row in rows], responses, are_finished, tools)
        return scores


@dataclass(frozen=True)
class Ensemble:
    """Combines several scorers. If they disagree, their training data did not decide."""

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
