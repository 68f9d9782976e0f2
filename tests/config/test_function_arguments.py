"""Arguments for a function that is imported already, as its signature has them."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from align.config.function_arguments import check_call
from align.errors import UserError
from tests.support import rewards


def test_arguments_are_checked_against_the_signature() -> None:
    check_call(rewards.length, {"limit": 3}, "length", "score")
    check_call(rewards.anything, {"any": 1}, "anything", "score")
    check_call(functools.partial(rewards.needs_answer, answer="x"), {"other": 1}, "partial", "score")
    check_call(max, {"key": 1}, "max", "score")  # written in C
    with pytest.raises(UserError, match=r"score.arguments: length has no argument 'limits'. Did you mean 'limit'"):
        check_call(rewards.length, {"limits": 3}, "length", "score")
    with pytest.raises(UserError, match=r"score\[1\]: needs_answer needs answer"):
        check_call(rewards.needs_answer, {}, "needs_answer", "score[1]")


def test_the_first_two_parameters_are_passed_by_position_whatever_they_are_called() -> None:
    def odd(batch: Any, texts: Any, factor: float = 1.0) -> None: ...

    check_call(odd, {"factor": 2.0}, "odd", "score")
    with pytest.raises(UserError, match="odd has no argument 'texts'"):
        check_call(odd, {"texts": 2.0}, "odd", "score")
