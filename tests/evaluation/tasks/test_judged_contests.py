"""From outcomes to the scorecard's row, and what a judge's verdicts say about its eye for places."""

from __future__ import annotations

import math

import pytest

from align.evaluation.tasks.judged import Contest, outcome_by_score, verdict_counts
from align.judges.prompts import Outcome

OUTCOMES: list[Outcome] = ["one"] * 5 + ["other"] * 2 + ["tie"] * 2 + ["disagreement"] + ["unreadable"] * 3


def test_ties_count_half_and_unreadable_are_skipped() -> None:
    row = Contest("ppo", "sft", OUTCOMES, [0] * 13).row("mt", "good-model")
    counts = {name: row[name] for name in ("n", "wins", "losses", "ties", "disagreements", "unreadable")}
    assert counts == {"n": 10, "wins": 5, "losses": 2, "ties": 2, "disagreements": 1, "unreadable": 3}
    assert row["win_rate"]["value"] == pytest.approx((5 + 1.5) / 10) and row["win_rate"]["n"] == 10
    assert row["win_rate"]["low"] < 0.65 < row["win_rate"]["high"]
    assert (row["task"], row["judge"], row["one"], row["other"]) == ("mt", "good-model", "ppo", "sft")
    # All gaps are 0: half a win and half a loss are added to 6.5 of 10.
    assert row["length_controlled"]["value"] == pytest.approx(7 / 11)


def test_gaps_go_with_their_own_question() -> None:
    # The unreadable one in front has an enormous gap; were gaps out of step, one side would be always longer.
    outcomes: list[Outcome] = ["unreadable", *["one", "other"] * 10]
    row = Contest("a", "b", outcomes, [-100_000, *[50, -50] * 10]).row("t", "j")
    assert row["length_controlled"]["value"] == pytest.approx(0.5)
    assert Contest("a", "b", outcomes, [-100_000, *[50] * 20]).row("t", "j")["length_controlled"] is None


def test_a_hundred_wins_are_not_beyond_doubt() -> None:
    rate = Contest("a", "b", ["one"] * 100, [0] * 100).row("t", "j")["win_rate"]
    assert rate["value"] == 1.0 and 0.95 < rate["low"] < 0.99


def test_how_often_the_first_one_is_named() -> None:
    counts = verdict_counts([
        Contest("a", "b", [], [], ["first", "first", "tie", None]), Contest("a", "c", [], [], ["first", "second"])
    ])  # fmt: skip
    assert counts == {"first": 3, "second": 1, "tie": 1, "unreadable": 1, "first_share": 0.75}
    assert verdict_counts([Contest("a", "b", [], [], [None, "tie"])])["first_share"] is None


def test_scores_decide() -> None:
    outcomes = [
        outcome_by_score(a, b) for a, b in [(1.0, 0.5), (0.5, 1.0), (2.0, 2.0), (math.nan, 0.0), (0.0, math.inf)]
    ]
    assert outcomes == ["one", "other", "tie", "unreadable", "unreadable"]
