"""Scores of steps: where steps end, what a function may return, and sums with other rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.scoring.functions import FunctionScorer
from align.scoring.score import Part, WeightedSum
from align.scoring.scored import StepScore, read_steps, split_steps
from tests.support.refusals import Refused

ANSWER = "\n\nFirst.\n\n\n\n Second one. \n\nThird"
ROWS: list[Any] = [{"id": "7"}]


def test_steps_are_parts_between_separators() -> None:
    places = split_steps(ANSWER, "\n\n")
    assert [ANSWER[first:end] for first, end in places] == ["First.", "Second one.", "Third"]
    assert split_steps("", "\n\n") == split_steps("\n\n \n\n", "\n\n") == []
    assert split_steps("one", "\n\n") == [(0, 3)]


def test_scores_are_read_by_separator_and_by_text() -> None:
    ends = [end for _, end in split_steps(ANSWER, "\n\n")]
    by_separator = read_steps(ANSWER, "\n\n", [1, -0.5, 2])
    assert by_separator == [StepScore(ends[0], 1.0), StepScore(ends[1], -0.5), StepScore(ends[2], 2.0)]
    by_text = read_steps(ANSWER, "\n\n", [("First.", 1), ("Second one.", -0.5), ["Third", 2]])
    assert by_text == by_separator
    # Equal texts are found one after another.
    assert read_steps("ab ab", " ", [("ab", 1), ("ab", 2)]) == [StepScore(2, 1.0), StepScore(5, 2.0)]
    assert read_steps("", " ", []) == []


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [1.0, 2.0, float("nan")],
        [1.0, 2.0, "3"],
        [("Second one.", 1), ("First.", 1)],
        [("", 1)],
        [("First.", 1, 2)],
    ],
)
def test_scores_that_fit_no_steps_are_refused(refused: Refused, values: list[Any]) -> None:
    refused(read_steps, ANSWER, "\n\n", values)


def scorer(function: Any) -> FunctionScorer:
    return FunctionScorer("rewards:steps", function, separator="\n\n")


def test_function_may_score_steps_with_metrics_or_the_whole() -> None:
    def steps(rows: list[Any], responses: list[str]) -> list[Any]:
        return [[1.0, 2.0], {"score": np.array([0.5]), "depth": 3}, 4.0, []]

    scored = scorer(steps).score(ROWS * 4, ["a\n\nb", "c", "whole", ""])
    assert scored.total == [3.0, 0.5, 4.0, 0.0]
    assert scored.metrics["steps"] == [2.0, 1.0, 0.0, 0.0]
    assert scored.steps == [[StepScore(1, 1.0), StepScore(4, 2.0)], [StepScore(1, 0.5)], [], []]


def test_steps_count_characters_after_the_thought() -> None:
    scored = scorer(lambda rows, responses: [[1.0]]).score(ROWS, ["<think>a\n\nb</think>ab"])
    assert scored.steps == [[StepScore(2, 1.0)]]


def test_wrong_scores_of_steps_name_the_row(refused: Refused) -> None:
    refused(lambda: scorer(lambda rows, responses: [[1.0]]).score(ROWS, ["a\n\nb"]))


def test_weighted_sum_keeps_the_steps_of_its_parts() -> None:
    first = Part("first", 2.0, scorer(lambda rows, responses: [[1.0, 2.0]]))
    second = Part("second", -1.0, scorer(lambda rows, responses: [[("b", 4.0)]]))
    third = Part("third", 1.0, FunctionScorer("rewards:plain", lambda rows, responses: [10.0]))
    scored = WeightedSum((first, second, third)).score(ROWS, ["a\n\nb"])
    # 2 * (1 + 2) - 4 + 10 in all, of which the steps have 2, 4 and -4.
    assert scored.total == [12.0]
    assert scored.steps == [[StepScore(1, 2.0), StepScore(4, 4.0), StepScore(4, -4.0)]]
    assert WeightedSum((third,)).score(ROWS, ["a"]).steps is None
