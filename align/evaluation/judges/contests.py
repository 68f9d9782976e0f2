"""What many comparisons of two systems come to: wins, ties, the win rate, also at equal length. Torch-free.

Left out: asking judges (``judgments.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.evaluation.comparisons import win_rate
from align.evaluation.judges.judge import Outcome, Verdict
from align.evaluation.judges.length_control import length_controlled

POINTS: dict[Outcome, float] = {"one": 1.0, "other": 0.0, "tie": 0.5, "disagreement": 0.5}
"""What an outcome gives ``one``; one that could not be read gives nothing to either and is left out."""
NOT_MEASURED = "not measured"
"""Method of a win rate between answers that are all the same."""
TURNED: dict[Outcome, Outcome] = {"one": "other", "other": "one"}


@dataclass(frozen=True)
class Contest:
    """Two systems' answers to the same questions, compared one by one."""

    one: str
    other: str
    outcomes: list[Outcome]
    gaps: list[int]
    """Characters of ``one``'s answers minus ``other``'s, question by question."""
    verdicts: list[Verdict | None] = field(default_factory=list)
    """Everything a judge said who was asked in both orders; empty for one who has no order."""
    same: int = 0
    """Questions that both sides answered word for word alike: ties that nobody was asked about."""

    def turned(self) -> Contest:
        """The same from the other's side."""
        outcomes: list[Outcome] = [TURNED.get(outcome, outcome) for outcome in self.outcomes]
        return Contest(self.other, self.one, outcomes, [-gap for gap in self.gaps], self.verdicts, self.same)

    @property
    def decided(self) -> list[int]:
        """Questions with an outcome."""
        return [at for at, outcome in enumerate(self.outcomes) if outcome in POINTS]

    def points(self) -> list[float]:
        """Of the decided questions: 1 won, 0 lost, 0.5 neither."""
        return [POINTS[self.outcomes[at]] for at in self.decided]

    @property
    def is_copy(self) -> bool:
        """Whether no two answers differ, so that nothing was compared."""
        return bool(self.outcomes) and self.same == len(self.outcomes)

    def rate(self) -> dict[str, Any]:
        """Share won, with its interval; without one where nothing was compared: no noise was measured then."""
        rate = win_rate(self.points()).as_dict()
        return {**rate, "low": None, "high": None, "method": NOT_MEASURED} if self.is_copy else rate

    def row(self, task: str, judge: str) -> dict[str, Any]:
        """The contest in the scorecard's ``win_rates``."""
        counts = Counter(self.outcomes)
        points = self.points()
        gaps = [self.gaps[at] for at in self.decided]
        equal = None if self.is_copy else length_controlled(points, gaps)
        return {
            "task": task,
            "judge": judge,
            "one": self.one,
            "other": self.other,
            "n": len(points),
            "wins": counts["one"],
            "ties": counts["tie"],
            "losses": counts["other"],
            "disagreements": counts["disagreement"],
            "unreadable": counts["unreadable"],
            "same_answers": self.same,
            "win_rate": self.rate(),
            "length_controlled": None if equal is None else equal.as_dict(),
        }


def verdict_counts(contests: Sequence[Contest]) -> dict[str, Any]:
    """What a judge said in all, and ``first_share``: of the verdicts that named an answer, how many the first one.

    0.5 is no bias towards either place, since every pair is shown in both orders.
    """
    said = Counter(verdict or "unreadable" for contest in contests for verdict in contest.verdicts)
    named = said["first"] + said["second"]
    return {
        **{name: said[name] for name in ("first", "second", "tie", "unreadable")},
        "first_share": round(said["first"] / named, 4) if named else None,
    }


def by_scores(one: Sequence[float], other: Sequence[float]) -> list[Outcome]:
    """Outcomes by a scorer: the higher score wins, equal ones tie, a score that is no number is unreadable."""

    def outcome(a: float, b: float) -> Outcome:
        if not (math.isfinite(a) and math.isfinite(b)):
            return "unreadable"
        return "tie" if a == b else "one" if a > b else "other"

    return [outcome(a, b) for a, b in zip(one, other, strict=True)]
