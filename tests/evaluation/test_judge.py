"""A judge's question and verdicts, and the whole table of both orders."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from align.data.rows import assistant, user
from align.evaluation.judge import JudgeConfig, Outcome, Verdict, question, read_verdict, settle


def test_the_question_shows_everything_once_and_in_order() -> None:
    prompt = [user("What is {this}?"), assistant("A brace."), user("And [[B]]?")]
    (message,) = question(prompt, "first {x}", "second %s", "Shorter is better.")
    text = message["content"]
    assert message["role"] == "user"
    assert "User: What is {this}?\n\nAssistant: A brace.\n\nUser: And [[B]]?" in text
    assert (
        text.index("Shorter is better.") < text.index("### Answer A\nfirst {x}") < text.index("### Answer B\nsecond %s")
    )


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A is clearer. [[A]]", "first"),
        ("[[B]]\n", "second"),
        ("Neither. [[ C ]]", "tie"),
        ("At first [[A]] seemed right.\nBut: [[B]], so [[B]].\n\nThanks", "second"),
        ("[[A]]\nEnd with [[A]] if answer A is better, [[B]] if answer B is better", None),
        ("B", "second"),
        ("**Answer A**.", "first"),
        ("a.", "first"),
        ("A is better", None),
        ("[A]", "first"),
        ("[A] is better", None),
        ("[[D]]", None),
        ("[[a]] I think", None),
        ("", None),
        ("AB", None),
    ],
)
def test_what_a_verdict_is(text: str, verdict: Verdict | None) -> None:
    assert read_verdict(text) == verdict


TABLE: dict[tuple[Verdict | None, Verdict | None], Outcome] = {
    ("first", "second"): "one",
    ("second", "first"): "other",
    ("tie", "tie"): "tie",
    ("first", "first"): "disagreement",
    ("second", "second"): "disagreement",
    ("first", "tie"): "disagreement",
    ("tie", "first"): "disagreement",
    ("second", "tie"): "disagreement",
    ("tie", "second"): "disagreement",
    (None, "first"): "unreadable",
    ("second", None): "unreadable",
    (None, "tie"): "unreadable",
    ("tie", None): "unreadable",
    (None, None): "unreadable",
    ("first", None): "unreadable",
    (None, "second"): "unreadable",
}


def test_both_orders() -> None:
    assert len(TABLE) == 16
    for (straight, swapped), outcome in TABLE.items():
        assert settle(straight, swapped) == outcome, (straight, swapped)


def test_an_empty_rubric_is_refused() -> None:
    with pytest.raises(ValidationError, match="say what makes an answer better"):
        JudgeConfig(rubric=" ")
