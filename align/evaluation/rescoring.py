"""Scores of stored responses by one or two rewards, their summary, and the responses about which two scores disagree.

Torch-free.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.final_answers import AnswerText
from align.data.rows import Row
from align.evaluation.calibration import ranks
from align.scoring.score import WeightedSum
from align.verifiers.verdict import REASONS

DISAGREEMENT = 0.5
"""Least distance of two scores, both scaled to [0, 1], that is a disagreement."""


@dataclass(frozen=True)
class StoredResponse:
    """A response with the row that it answers."""

    row: Row
    text: AnswerText
    name: str
    """Place of the response in its row: ``completion``, ``chosen``, or its number from 1."""
    finished: bool = True
    score: float | None = None
    """Score that the data have for it."""


@dataclass(frozen=True)
class Rescored:
    """Scores of responses by one score, and the reasons of its verifiers."""

    name: str
    scores: list[float | None]
    """None for a response without a score, which only stored scores have."""
    reasons: list[str]
    parts: dict[str, list[float]] = field(default_factory=dict)
    """Scores of the rewards of a list, and metrics, by name."""

    def summary(self) -> dict[str, Any]:
        """Return the number of scores, their mean and range, the means of the parts, and counts of the reasons."""
        present = [score for score in self.scores if score is not None]
        counts = Counter(reason for reason in self.reasons if reason)
        means = {}
        for name, values in self.parts.items():
            finite = [value for value in values if math.isfinite(value)]
            if finite:
                means[name] = statistics.fmean(finite)
        return {
            "name": self.name,
            "responses": len(present),
            "mean": statistics.fmean(present) if present else None,
            "min": min(present, default=None),
            "max": max(present, default=None),
            "parts": means,
            "reasons": dict(counts.most_common()),
        }


@dataclass(frozen=True)
class Agreement:
    """Comparison of two scores of the same responses."""

    first: Rescored
    second: Rescored
    compared: int
    correlation: float | None
    """Spearman's rank correlation; None if a score does not vary."""
    disagreements: list[int]
    """Indices of the responses, the largest distance first."""

    def to_json(self, responses: Sequence[StoredResponse], examples: int) -> dict[str, Any]:
        """Return the counts, and the first disagreements as plain data."""
        return {
            "first": self.first.name,
            "second": self.second.name,
            "compared": self.compared,
            "rank_correlation": self.correlation,
            "disagreements": len(self.disagreements),
            "examples": [self.example(responses[index], index) for index in self.disagreements[:examples]],
        }

    def example(self, response: StoredResponse, index: int) -> dict[str, Any]:
        """Return a response with both scores and reasons as plain data."""
        return {
            "id": str(response.row.get("id", "")),
            "response": response.name,
            "scores": [self.first.scores[index], self.second.scores[index]],
            "reasons": [self.first.reasons[index], self.second.reasons[index]],
            "text": str(response.text),
        }


def rescore(name: str, scorer: WeightedSum, responses: Sequence[StoredResponse]) -> Rescored:
    """Return the scores of responses; raises as the rewards of ``scorer`` do."""
    rows = [response.row for response in responses]
    texts: list[str] = [response.text for response in responses]
    scored = scorer.score(rows, texts, [not response.finished for response in responses])
    columns = scored.columns()
    # Metrics that mark a reason, with the names that are shown: without the reward's if it is the only one.
    marks = {
        f"{part.name}_{reason}": reason if len(scorer.parts) == 1 else f"{part.name}_{reason}"
        for part in scorer.parts
        for reason in REASONS
    }
    reasons = [
        ", ".join(shown for metric, shown in marks.items() if metric in columns and columns[metric][index] == 1.0)
        for index in range(len(responses))
    ]
    other_columns = {metric: values for metric, values in columns.items() if metric not in marks}
    return Rescored(name, list(scored.total), reasons, other_columns)


def stored_scores(responses: Sequence[StoredResponse]) -> Rescored | None:
    """Return the scores that the data have; None if they have none."""
    scores = [response.score for response in responses]
    if all(score is None for score in scores):
        return None
    return Rescored("stored", scores, [""] * len(scores))


def compare(first: Rescored, second: Rescored) -> Agreement:
    """Return how two scores of the same responses agree. Scores outside [0, 1] are scaled to it by their range."""
    indices: list[int] = []
    first_scores: list[float] = []
    second_scores: list[float] = []
    for index, (first_score, second_score) in enumerate(zip(first.scores, second.scores, strict=True)):
        if first_score is not None and second_score is not None:
            indices.append(index)
            first_scores.append(first_score)
            second_scores.append(second_score)
    pairs = zip(_scaled(first_scores), _scaled(second_scores), strict=True)
    distances = {index: abs(a - b) for index, (a, b) in zip(indices, pairs, strict=True)}
    disagreements = [index for index in indices if distances[index] >= DISAGREEMENT]
    disagreements.sort(key=lambda index: -distances[index])
    return Agreement(first, second, len(indices), _rank_correlation(first_scores, second_scores), disagreements)


def _scaled(scores: Sequence[float]) -> list[float]:
    low = min(scores, default=0.0)
    high = max(scores, default=1.0)
    # Scores in [0, 1] keep their scale: stretched to it, two close scores would disagree.
    if low >= 0.0 and high <= 1.0:
        return list(scores)
    return [(score - low) / (high - low) if high > low else 0.0 for score in scores]


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(ranks(first), ranks(second))
