"""What splits go by: the first question, and a draw that nothing else changes."""

from __future__ import annotations

import pytest

from align.data.rows import assistant, user
from align.data.splits import group, share


def test_conversations_that_grow_from_one_question_stay_together() -> None:
    grown = {"id": "x", "prompt": [user("Hello, there"), assistant("hi"), user("more")]}
    assert group(grown) == group({"id": "y", "prompt": [{"role": "system", "content": "s"}, user("hello there!")]})


def test_a_draw_is_fixed_and_even() -> None:
    assert share("a", 1) == pytest.approx(0.2554167428112489, abs=1e-12)
    assert share("a", 1) != share("a", 2) != share("b", 1)
    draws = [share(str(number), 0) for number in range(2000)]
    assert all(0 <= draw < 1 for draw in draws) and 0.47 < sum(draws) / len(draws) < 0.53
