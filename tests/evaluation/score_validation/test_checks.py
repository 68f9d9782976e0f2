"""Checks of rewards on answers whose order is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from align.config.scores import ScoreValidation
from align.config.verifiers import EnvironmentVerifier
from align.data.rows import Row, assistant, user
from align.errors import UserError
from align.evaluation.score_validation.validation import Validation, check_references, refuse_problems, validate_parts
from align.scoring.functions import FunctionScorer
from align.scoring.score import Part
from align.scoring.scored import Scored, Scorer
from align.scoring.verifiers import open_verifier
from tests.support.refusals import Refused

ROWS: list[Row] = [
    {"id": f"r{index}", "prompt": [user(f"double {index}")], "completion": [assistant(f"it is {2 * index}")]}
    | {"answer": str(2 * index)}
    for index in range(1, 21)
]
SETTINGS = ScoreValidation()


class Model(Scorer):
    """Scores as a reward model would."""

    def score(self, rows: list[Row], responses: list[str], truncated: Any = None) -> Scored:
        return Scored([float(len(text)) for text in responses])


def function(rule: Callable[[Row, str], float], weight: float = 1.0, name: str = "own") -> Part:
    def score(rows: list[Row], responses: list[str]) -> list[float]:
        return [rule(row, text) for row, text in zip(rows, responses, strict=True)]

    return Part(name, weight, FunctionScorer("module:own", score, label=name))


def right(row: Row, text: str) -> float:
    return float(text.split()[-1:] == [row["answer"]])


def number(weight: float = 1.0) -> Part:
    return Part("number", weight, open_verifier(EnvironmentVerifier(number="answer"), "score"))


def validated(*parts: Part, rows: list[Row] = ROWS, **options: Any) -> Validation:
    return validate_parts(parts, rows, options.pop("settings", SETTINGS), **options)


def passed(validation: Validation, name: str) -> dict[str, tuple[int, int]]:
    report = next(report for report in validation.reports if report.name == name)
    return {check.name: (check.passed, check.total) for check in report.checks}


def test_verifier_passes_all_checks() -> None:
    validation = validated(number())
    # "double 2" ends in the number of the prompt, which is never the answer.
    every = (20, 20)
    expected = {"reference": every, "empty": every, "other": every, "prompt": every, "twice": (16, 16)}
    assert passed(validation, "number") == expected
    assert validation.problems() == [] and validation.is_complete


def test_share_below_the_floor_is_refused() -> None:
    """Two of twenty references fail: 0.9 passes, and 0.91 does not."""
    part = function(lambda row, text: right(row, text) * (row["id"] not in ("r3", "r4")))
    assert validated(part).problems() == []
    (problem,) = validated(part, settings=ScoreValidation(floor=0.91)).problems()
    assert "(in 2 of 20 rows). Row 'r3': the reference 'it is 6' scores 0, an empty answer 0" in problem


def test_sum_decides_about_parts_without_a_maximum() -> None:
    brevity = function(lambda row, text: 1 / (1 + len(text)), 0.5, "brevity")
    validation = validated(function(right), brevity)
    assert passed(validation, "brevity")["reference"] == (0, 20)
    assert passed(validation, "sum")["reference"] == (20, 20)
    assert validation.problems() == []
    heavy = function(lambda row, text: 1 / (1 + len(text)), 5.0, "brevity")
    assert "'sum' does not give references its maximum" in validated(function(right), heavy).problems()[0]


def test_reward_of_weight_0_is_only_shown() -> None:
    validation = validated(number(), function(lambda row, text: 0.0, 0.0, "logged"))
    assert [report.name for report in validation.reports] == ["number", "logged"]
    assert validation.problems() == [] and validation.is_complete


def test_reward_model_is_validated_only_on_request() -> None:
    model = Part("rm", 1.0, Model())
    validation = validated(model, function(lambda row, text: 0.0, name="constant"))
    assert [report.name for report in validation.reports] == ["constant"]
    # Without the model's scores nothing is known about the sum.
    assert validation.problems() == [] and not validation.is_complete
    assert validation.notes == ["'rm' was not validated, because it is a checkpoint"]
    assert [report.name for report in validated(model, with_models=True).reports] == ["rm"]


def test_style_is_not_compared_with_references() -> None:
    """Rows with examples of responses accept a style, and rows with right answers do not."""
    style = function(lambda row, text: -float(len(text)))
    validation = validated(style, rows=[row | {"answer": None} for row in ROWS])
    assert validation.problems() == []
    assert validation.all_notes() == [
        "'own' does not depend on the row, so references are not compared with other answers"
    ]
    (problem,) = validated(style).problems()
    assert "'own' reads neither the row's answer nor its prompt" in problem


def test_few_rows_refuse_nothing_but_randomness() -> None:
    constant = function(lambda row, text: 0.5)
    validation = validated(constant, rows=ROWS[:3])
    assert validation.problems() == [] and "only 3 rows have a reference answer" in validation.notes[0]
    scores = iter(range(1000))
    (problem,) = validated(function(lambda row, text: float(next(scores))), rows=ROWS[:3]).problems()
    assert "An answer scored 0, then" in problem


def test_better_answers_of_pairs_may_be_wrong() -> None:
    pairs = [
        {"id": row["id"], "prompt": row["prompt"], "answer": "", "chosen": row["completion"], "number": row["answer"]}
        for row in ROWS
    ]
    wrong = [pair | {"chosen": [assistant("it is 1")]} for pair in pairs[:8]]
    part = Part("number", 1.0, open_verifier(EnvironmentVerifier(number="number"), "score"))
    validation = validated(part, rows=[*wrong, *pairs[8:]])
    assert passed(validation, "number")["reference"] == (12, 20) and validation.problems() == []


def test_rows_without_references_are_told() -> None:
    validation = validated(number(), rows=[{"id": "1", "prompt": [user("x")]}])
    assert validation.reports == [] and "no row has a reference answer" in validation.notes[0]


def test_function_that_fails_is_named_with_the_answer(refused: Refused) -> None:
    part = function(lambda row, text: float(text[0] == "i"))
    refused(validated, part, place="ppo")


def test_refusal_has_place_cause_and_remedy() -> None:
    with pytest.raises(UserError) as refusal:
        refuse_problems(validated(function(lambda row, text: 0.5)), "grpo")
    message = str(refusal.value)
    assert message.startswith("grpo: the score cannot teach the task; fewer than 90% of the rows pass a check:\n")
    assert (
        "`align score DATA --with SPEC --validate`" in message and "score_validation: {waive: [reference, " in message
    )


def test_hostile_text_is_quoted() -> None:
    rows = [row | {"completion": [assistant("\x1b[2J" + row["answer"])]} for row in ROWS]
    (problem,) = validated(function(lambda row, text: 0.0), rows=rows).problems()
    assert "\x1b" not in problem and r"\x1b[2J2" in problem


@pytest.mark.parametrize("bad", ["none", None])
def test_references_of_all_rows_are_read_before_training(refused: Refused, bad: str | None) -> None:
    rows = [{"id": str(index), "answer": str(index)} for index in range(200)] + [{"id": "last", "answer": bad}]
    check_references([number()], rows[:-1])
    refused(lambda: check_references([number()], rows))
