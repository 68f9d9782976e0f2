"""Reference answers of rows, the sample of rows, and the wrong answer of each."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.scores import ScoreValidation
from align.data.rows import Row, assistant, user
from align.evaluation.score_validation.references import choose_probes, reference_of, select_probes


def row(index: int, answer: str, **more: Any) -> Row:
    return {"id": str(index), "prompt": [user(f"question {index}")], "answer": answer, **more}


@pytest.mark.parametrize(
    ("fields", "reference"),
    [
        ({"completion": [assistant("yes")], "answer": "no"}, "yes"),
        ({"completion": [assistant("bad")], "label": False}, None),
        ({"completion": [assistant("cut")], "completion_finished": False, "answer": "whole"}, "whole"),
        ({"answer": 4}, "4"),
        ({"checks": '{"answer": "72"}'}, "72"),
        ({"chosen": [user("?"), assistant("better")], "rejected": [assistant("worse")]}, "better"),
        ({"completion": [], "answer": None}, None),
        ({}, None),
    ],
)
def test_reference_is_the_rows_own_answer(fields: Row, reference: str | None) -> None:
    assert reference_of(fields) == reference


def test_named_column_is_the_only_reference() -> None:
    fields = {"completion": [assistant("yes")], "checks": '{"solution": "no"}'}
    assert reference_of(fields, "checks.solution") == "no"
    assert reference_of(fields, "other") is None


def test_sample_is_spread_and_has_rare_forms() -> None:
    rows = [row(index, f"{index:,}") for index in range(1015)]
    probes = choose_probes(rows, ScoreValidation(rows=10))
    ids = [probe.row["id"] for probe in probes]
    # 1015 * k // 10 for ten rows, then six of the fifteen with a separator.
    assert ids[:10] == ["0", "101", "203", "304", "406", "507", "609", "710", "812", "913"]
    assert ids[10:] == ["1000", "1001", "1002", "1003", "1004", "1005"]


def test_wrong_answer_has_another_value_in_each_column() -> None:
    answers = ["a", "a", "b", "a"]
    rows = [row(index, f"{answer} {index}", letter=answer) for index, answer in enumerate(answers)]
    others = [probe.other for probe in choose_probes(rows, ScoreValidation(), ["letter"])]
    assert others == [2, 2, 3, 2]
    same = [row(index, "a") for index in range(3)]
    assert [probe.other for probe in choose_probes(same, ScoreValidation())] == [None, None, None]


def test_selection_refers_to_its_own_probes() -> None:
    probes = choose_probes([row(index, f"x{index}") for index in range(20)], ScoreValidation())
    selected = select_probes(probes, 4)
    assert [probe.row["id"] for probe in selected] == ["0", "5", "10", "15"]
    assert [probe.other for probe in selected] == [1, 2, 3, 0]


def test_copied_prompt_that_is_the_reference_is_no_probe() -> None:
    rows = [row(1, "question 1"), row(2, "other")]
    assert [probe.prompt for probe in choose_probes(rows, ScoreValidation())] == [None, "question 2"]


def test_thought_of_a_reference_is_not_part_of_it() -> None:
    (probe,) = choose_probes([row(1, "<think>no</think>yes")], ScoreValidation())
    assert (probe.reference, probe.reference.thought) == ("yes", "<think>no</think>")
