"""Reward models score reference answers before the first update, and a model that rejects them all is told."""

from __future__ import annotations

from typing import Any

from align.data.rows import user
from align.evaluation.score_validation.stage import REFERENCE_ROWS, score_references
from align.scoring.functions import FunctionScorer
from align.scoring.score import Part, WeightedSum
from align.scoring.scored import Scored, Scorer


class Model(Scorer):
    """Scores by a function of row and response, as a reward model would."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def score(self, rows: list[Any], responses: list[str], truncated: Any = None) -> Scored:
        return Scored([self.function(row, text) for row, text in zip(rows, responses, strict=True)])


def rows(count: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": [user(f"{number} + 1?")], "answer": str(number + 1)} for number in range(count)]


def summed(*scorers: Any) -> WeightedSum:
    return WeightedSum(tuple(Part(str(index), 1.0, scorer) for index, scorer in enumerate(scorers)))


def test_references_are_described_with_their_range() -> None:
    scored = score_references(summed(Model(lambda row, text: float(text == row["answer"] and text != "1"))), rows())
    assert scored is not None
    assert (scored.scores, scored.empty_scores) == ([0.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert scored.describe().startswith("the reference answers of 3 rows score 0.667 on average (0 to 1), empty")
    assert scored.warning() is None


def test_model_that_accepts_nothing_is_told() -> None:
    scored = score_references(summed(Model(lambda row, text: float(text == row.get("solution")))), rows())
    assert scored is not None
    warning = scored.warning()
    assert warning is not None
    assert warning.startswith("the reward model scores 0 for every reference answer and for an empty one")
    assert "Example: reference '1'" in warning


def test_only_reward_models_are_asked() -> None:
    function = FunctionScorer("m:f", lambda rows, responses: [9.0] * len(responses))
    assert score_references(summed(function), rows()) is None
    scored = score_references(summed(function, Model(lambda row, text: 1.0)), rows())
    assert scored is not None and scored.scores == [1.0, 1.0, 1.0]


def test_few_rows_are_scored() -> None:
    scored = score_references(summed(Model(lambda row, text: 1.0)), [{"prompt": []}, *rows(100)])
    assert scored is not None and len(scored.scores) == REFERENCE_ROWS
    assert score_references(summed(Model(lambda row, text: 1.0)), [{"prompt": []}]) is None
