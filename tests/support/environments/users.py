"""Simulated users of tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from align.environments.simulated_user import UserAnswer, UserRequest


class ScriptedUser:
    """A user that a function plays: it returns a text, or an answer. Keeps the batches that it was asked."""

    def __init__(self, say: Callable[[Any], str | UserAnswer], in_background: bool = False) -> None:
        self.say, self.in_background = say, in_background
        self.batches: list[list[UserRequest]] = []
        self.loads = 0

    def load(self) -> None:
        """Count the loads."""
        self.loads += 1

    def answer(self, requests: Sequence[UserRequest]) -> list[UserAnswer]:
        """Answer by the function."""
        self.batches.append(list(requests))
        said = [self.say(request) for request in requests]
        return [answer if isinstance(answer, UserAnswer) else UserAnswer(answer) for answer in said]

    def usage(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""
