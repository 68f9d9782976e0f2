"""Splits go by the first question, depend on nothing else, and leave neither side empty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.rows import Row, assistant, user
from align.data.splits import group, sample, share, split


def rows(*questions: str) -> list[Row]:
    return [{"id": str(i), "prompt": [user(question)]} for i, question in enumerate(questions)]


def test_conversations_that_grow_from_one_question_stay_together() -> None:
    grown = {"id": "x", "prompt": [user("Hello, there"), assistant("hi"), user("more")]}
    assert group(grown) == group({"id": "y", "prompt": [{"role": "system", "content": "s"}, user("hello there!")]})


@given(st.lists(st.text("ab .!", min_size=1, max_size=4), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_no_prompt_on_both_sides_and_nothing_lost(questions: list[str], size: float) -> None:
    train, test = split(rows(*questions), size, 0)
    assert not {group(row) for row in train} & {group(row) for row in test}
    assert sorted(row["id"] for row in train + test) == sorted(str(i) for i in range(len(questions)))
    if len({group(row) for row in rows(*questions)}) > 1:
        assert train and test


def test_a_side_depends_on_the_prompt_alone() -> None:
    many = rows(*(f"question {i}" for i in range(1000)))
    tested = {group(row) for row in split(many, 0.2, 3)[1]}
    assert 150 < len(tested) < 250
    assert {group(row) for row in split(many[:300][::-1], 0.2, 3)[1]} == {group(row) for row in many[:300]} & tested
    assert {group(row) for row in split(many, 0.2, 4)[1]} != tested
    assert share("a", 1) == pytest.approx(share("a", 1)) and 0 <= share("a", 1) < 1


def test_sample_keeps_the_order() -> None:
    many = rows(*(f"question {i}" for i in range(50)))
    some = sample(many, 10, 0)
    assert len(some) == 10 and [row["id"] for row in some] == sorted((row["id"] for row in some), key=int)
    assert {row["id"] for row in sample(many, 5, 0)} <= {row["id"] for row in some}
