"""Scores of several scorers as one: an ensemble of reward models, and a weighted sum. Torch-free.

Left out: penalties and normalization (``align.rl.rewards``).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from align.data.rows import Row
from align.data.scoring import Parts, Scorer, parts_of
from align.errors import UserError

Combination = Literal["mean", "minimum", "uncertainty"]
"""Combination of the scores of several reward models (arXiv 2310.02743): their mean; their minimum, so that a response
must satisfy all; or the mean minus ``weight`` times their variance."""


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
    scorer: Scorer


@dataclass(frozen=True)
class WeightedSum:
    """The sum of ``weight * score`` over ``parts``."""

    parts: tuple[Part, ...]
    is_list: bool = False
    """True for parts that the user has named in a list: then even a single part is told by its name."""

    @property
    def names(self) -> list[str]:
        """Names of the parts whose scores are told beside their sum; none for a single part, which is the sum."""
        return [part.name for part in self.parts] if self.is_list or len(self.parts) > 1 else []

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Return one score per response."""
        return self.score_parts(rows, responses, truncated)[""]

    def score_parts(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> Parts:
        """Return the sum under ``""``, each part's unweighted scores under its name, its metrics as ``name_metric``.

        The scores of a single part are not repeated. Raises ``UserError`` where two parts give the same name.
        """
        totals = [0.0] * len(responses)
        parts: Parts = {"": totals}
        for part, components in zip(self.parts, self._score_each(rows, responses, truncated), strict=True):
            scores = components.pop("")
            for index, score in enumerate(scores):
                totals[index] += part.weight * score
            named = {part.name: scores} if part.name in self.names else {}
            named |= {f"{part.name}_{name}": values for name, values in components.items()}
            repeated = sorted(parts.keys() & named.keys())
            if repeated:
                raise UserError(f"score: two rewards give '{repeated[0]}'; set another `name` for one of them.")
            parts |= named
        return parts

    def _score_each(self, rows: list[Row], responses: list[str], truncated: list[bool] | None) -> list[Parts]:
        """Return the components of each part. Async functions and judges wait at the same time, in threads."""
        waiting = [index for index, part in enumerate(self.parts) if getattr(part.scorer, "waits", False)]
        with ThreadPoolExecutor(max(1, len(waiting))) as pool:
            futures: dict[int, Future[Parts]] = {
                index: pool.submit(parts_of, self.parts[index].scorer, rows, responses, truncated) for index in waiting
            }
            # The others compute meanwhile in this thread, where torch's settings hold.
            return [
                futures[index].result() if index in futures else parts_of(part.scorer, rows, responses, truncated)
                for index, part in enumerate(self.parts)
            ]
