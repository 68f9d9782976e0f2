"""What splits go by: the first question, and a draw that nothing else changes."""

from __future__ import annotations

import pytest

from align.data.rows import assistant, user
from align.data.splits import group, hold_back, share


def test_conversations_that_grow_from_one_question_stay_together() -> None:
    grown = {"id": "x", "prompt": [user("Hello, there"), assistant("hi"), user("more")]}
    assert group(grown) == group({"id": "y", "prompt": [{"role": "system", "content": "s"}, user("hello there!")]})


def test_a_draw_is_fixed_and_even() -> None:
    assert share("a", 1) == pytest.approx(0.2554167428112489, abs=1e-12)
    assert share("a", 1) != share("a", 2) != share("b", 1)
    draws = [share(str(number), 0) for number in range(2000)]
    assert all(0 <= draw < 1 for draw in draws) and 0.47 < sum(draws) / len(draws) < 0.53


def test_validation_takes_whole_questions_a_fifth_at_most_and_always_the_same_ones() -> None:
    rows = [
        {"id": f"{topic}-{number}", "prompt": [user(f"Question {topic}")]} for topic in range(50) for number in range(3)
    ]
    learned, validation = hold_back(rows, 24)
    assert len(validation) == 24 and len(learned) == 126
    assert not {group(row) for row in learned} & {group(row) for row in validation}
    assert [row for row in rows if row not in validation] == learned
    ids = {row["id"] for row in validation}
    assert {row["id"] for row in hold_back(rows[::-1], 24)[1]} == ids
    assert ids < {row["id"] for row in hold_back(rows, 10_000)[1]}
    assert len(hold_back(rows, 10_000)[1]) == 30  # 10 of 50 questions
    assert len(hold_back(rows, 1)[1]) == 3  # one question, though it has more rows
    assert hold_back(rows[:3], 9) == ([], rows[:3])
    assert hold_back([], 9) == ([], [])
    assert len(hold_back(rows[:6], 9)[1]) == 3


def test_a_question_of_most_rows_is_learned_whatever_its_draw() -> None:
    """As in chats that begin with one greeting. Whole questions are taken, so that one could be most of the split."""
    topics = [f"Question {number}" for number in range(20)]
    for common in topics:
        rows = [{"id": topic, "prompt": [user(topic)]} for topic in [*topics, *[common] * 80]]
        learned, validation = hold_back(rows, 512)
        assert {row["id"] for row in validation} <= set(topics) - {common}
        assert 1 <= len(validation) <= 4 and len(learned) + len(validation) == 100
