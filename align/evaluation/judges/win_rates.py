"""Win rates of two systems: wins, ties, the rate with its interval, also at equal length. Torch-free."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.evaluation.comparisons import win_rate
from align.evaluation.judges.judge_prompts import Outcome, Verdict
from align.evaluation.judges.length_control import length_controlled

POINTS: dict[Outcome, float] = {"one": 1.0, "other": 0.0, "tie": 0.5, "disagreement": 0.5}
"""Points of the first system for an outcome; unreadable outcomes are left out."""
NOT_MEASURED = "not measured"
"""Method of a win rate between answers that are all the same."""
SWAPPED: dict[Outcome, Outcome] = {"one": "other", "other": "one"}


@dataclass(frozen=True)
class Contest:
    """Two systems' answers to the same questions, compared question by question."""

    first: str
    second: str
    outcomes: list[Outcome]
    gaps: list[int]
    """Characters of ``first``'s answers minus ``second``'s, question by question."""
    verdicts: list[Verdict | None] = field(default_factory=list)
    """All verdicts of a judge that was asked in both orders; empty for a reward model."""
    same: int = 0
    """Questions with word-for-word equal answers: ties that no judge was asked about."""

    def swapped(self) -> Contest:
        """Return the contest from the second system's side."""
        outcomes: list[Outcome] = [SWAPPED.get(outcome, outcome) for outcome in self.outcomes]
        return Contest(self.second, self.first, outcomes, [-gap for gap in self.gaps], self.verdicts, self.same)

    @property
    def decided(self) -> list[int]:
        """Indices of the questions with a readable outcome."""
        return [index for index, outcome in enumerate(self.outcomes) if outcome in POINTS]

    def points(self) -> list[float]:
        """Return the points of the decided questions: 1 for a win, 0 for a loss, 0.5 for neither."""
        return [POINTS[self.outcomes[index]] for index in self.decided]

    @property
    def is_copy(self) -> bool:
        """True where no two answers differ, so that nothing was compared."""
        return bool(self.outcomes) and self.same == len(self.outcomes)

    def rate(self) -> dict[str, Any]:
        """Return the win rate with its interval; copies have no interval, as no noise was measured."""
        # Copies tie in every question by construction, and an interval around 0.5 would claim a measurement.
        rate = win_rate(self.points()).as_dict()
        return {**rate, "low": None, "high": None, "method": NOT_MEASURED} if self.is_copy else rate

    def row(self, task: str, judge: str) -> dict[str, Any]:
        """Return the contest as a row of the scorecard's ``win_rates``."""
        counts = Counter(self.outcomes)
        points = self.points()
        gaps = [self.gaps[index] for index in self.decided]
        equal_length = None if self.is_copy else length_controlled(points, gaps)
        return {
            "task": task,
            "judge": judge,
            "one": self.first,
            "other": self.second,
            "n": len(points),
            "wins": counts["one"],
            "ties": counts["tie"],
            "losses": counts["other"],
            "disagreements": counts["disagreement"],
            "unreadable": counts["unreadable"],
            "same_answers": self.same,
            "win_rate": self.rate(),
            "length_controlled": None if equal_length is None else equal_length.as_dict(),
        }


def verdict_counts(contests: Sequence[Contest]) -> dict[str, Any]:
    """Count a judge's verdicts; ``first_share`` is the share of the first answer among verdicts that name one.

    0.5 is no position bias, since every pair is shown in both orders.
    """
    counts = Counter(verdict or "unreadable" for contest in contests for verdict in contest.verdicts)
    decisive = counts["first"] + counts["second"]
    return {
        **{name: counts[name] for name in ("first", "second", "tie", "unreadable")},
        "first_share": round(counts["first"] / decisive, 4) if decisive else None,
    }


def outcomes_by_score(first: Sequence[float], second: Sequence[float]) -> list[Outcome]:
    """Return outcomes by a scorer: the higher score wins, equal ones tie, a score that is not finite is unreadable."""
    return [_outcome(a, b) for a, b in zip(first, second, strict=True)]


def _outcome(first: float, second: float) -> Outcome:
    if not (math.isfinite(first) and math.isfinite(second)):
        return "unreadable"
    if first == second:
        return "tie"
    return "one" if first > second else "other"
