"""What a judge is shown to grade one answer, and the whole table of how its grade is read."""

from __future__ import annotations

import pytest

from align.data.rows import assistant, user
from align.judges.prompts import GRADE_PROMPT, REFERENCE_NOTE, format_references, grade_prompt, read_grade
from tests.support.evaluation.judged_harness import parts


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Good.\n[[8]]", 8.0),
        ("[[7.5]]", 7.5),
        ("Rating: [[ 10 ]]", 10.0),
        ("[[9/10]]", 9.0),
        ("[[1]]", 1.0),
        ("I first thought [[3]].\nIt is right.\n**Grade: [[6]]**\n", 6.0),
        ("I first thought [[3]].\nBut it is right: [[6]]\nBye", None),
        ("[[2]]\nThe answer asks for [[10]]", None),
        ("[[2]]\nThe answer ends with:\n[[10]]", None),
        ("[[2]]\n> [[10]]", None),
        ('[[2]]\n"[[10]]"', None),
        ("[[6]], so [[6]]", None),
        ("8", 8.0),
        (" 8/10. ", 8.0),
        ("[[5]] or [[6]]", None),
        ("[[5]]\n[[0]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[100]]", None),
        ("[[-3]]", None),
        ("[[10.5]]", None),
        ("[[N]]", None),
        ("[8]", None),
        ("Rating: 8", None),
        ("I give 8 of 10", None),
        ("[[eight]]", None),
        ("", None),
    ],
)
def test_what_a_grade_is(text: str, grade: float | None) -> None:
    assert read_grade(text) == grade


def test_the_question_repeated_is_no_grade() -> None:
    (message,) = grade_prompt([user("Name a number"), assistant("Seven")], reference="8")
    assert read_grade(message["content"]) is None


def test_judge_prompt_order_is_conversation_references_answer() -> None:
    conversation = [user("Add {1} and 2"), assistant("3"), user("Double it"), assistant("6")]
    (message,) = grade_prompt(conversation, "Be strict.", format_references(["three", "six"]))
    assert "Be strict." in message["content"] and REFERENCE_NOTE.strip() in message["content"]
    assert parts(message["content"]) == [
        ("User", "Add {1} and 2"),
        ("Assistant", "3"),
        ("User", "Double it"),
        ("Reference answer", "To message 1: three\n\nTo message 2: six"),
        ("Assistant, the answer to grade", "6"),
    ]


def test_without_a_reference_nothing_is_said_of_one() -> None:
    (message,) = grade_prompt([user("Hello"), assistant("   ")])
    assert "eference" not in message["content"] and "{" not in message["content"]
    assert parts(message["content"])[-1][1] == "(nothing)"
    assert "{compare}" in GRADE_PROMPT
