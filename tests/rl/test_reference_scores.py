"""Reference answers are scored before the first update, and a reward that rejects them all is told."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.rows import assistant, user
from align.data.scoring import Part, WeightedSum
from align.rl.reference_scores import REFERENCE_ROWS, reference_of, score_references


class Scorer:
    """Scores by a function of row and response."""

    def __init__(self, function: Any, waits: bool = False) -> None:
        self.function, self.waits = function, waits

    def score(self, rows: list[Any], responses: list[str], truncated: Any = None) -> list[float]:
        return [self.function(row, text) for row, text in zip(rows, responses, strict=True)]


def rows(count: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": [user(f"{number} + 1?")], "answer": str(number + 1)} for number in range(count)]


def summed(*scorers: Scorer) -> WeightedSum:
    return WeightedSum(tuple(Part(str(index), 1.0, scorer) for index, scorer in enumerate(scorers)))


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"completion": [assistant("yes")], "answer": "no"}, "yes"),
        ({"chosen": [user("?"), assistant("better")], "rejected": [assistant("worse")]}, "better"),
        ({"answer": 4}, "4"),
        ({"answer": ""}, None),
        ({"completion": [], "answer": None}, None),
        ({}, None),
    ],
)
def test_reference_is_the_rows_own_answer(row: dict[str, Any], reference: str | None) -> None:
    assert reference_of(row) == reference


def test_references_are_described_with_their_range() -> None:
    scored = score_references(summed(Scorer(lambda row, text: float(text == row["answer"] and text != "1"))), rows())
    assert scored is not None
    assert (scored.scores, scored.empty_scores) == ([0.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert scored.describe().startswith("the reference answers of 3 rows score 0.667 on average (0 to 1), empty")
    assert scored.warning() is None


def test_reward_that_accepts_nothing_is_told() -> None:
    scored = score_references(summed(Scorer(lambda row, text: float(text == row.get("solution")))), rows())
    assert scored is not None
    warning = scored.warning()
    assert warning is not None
    assert warning.startswith("the reward scores 0 for every reference answer and for an empty one")
    assert "Example: reference '1'" in warning


def test_scorers_that_wait_for_servers_are_not_asked() -> None:
    judge = Scorer(lambda row, text: pytest.fail("a judge was asked"), waits=True)
    assert score_references(summed(judge), rows()) is None
    scored = score_references(summed(judge, Scorer(lambda row, text: 1.0)), rows())
    assert scored is not None and scored.scores == [1.0, 1.0, 1.0]


def test_few_rows_are_scored() -> None:
    scored = score_references(summed(Scorer(lambda row, text: 1.0)), [{"prompt": []}, *rows(100)])
    assert scored is not None and len(scored.scores) == REFERENCE_ROWS
    assert score_references(summed(Scorer(lambda row, text: 1.0)), [{"prompt": []}]) is None
