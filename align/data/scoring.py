"""Scorers, which give one number per response: verifiable functions here, reward models in ``align.models``.

``gold`` is short for ``align.data.checkers:gold``. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from align.config.user_functions import full_path, load_function
from align.data.rows import Row
from align.errors import UserError

ScoreFunction = Callable[[list[Row], list[str]], list[float]]


class Scorer(Protocol):
    """An object that gives one score per response."""

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Return scores in the order of ``rows``; ``truncated`` marks responses that hit the length limit."""
        ...


@dataclass(frozen=True)
class FunctionScorer:
    """A verifiable function as a scorer. It judges a truncated response by its text, like any other."""

    path: str
    function: ScoreFunction

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Call the function. Raises ``UserError`` for a wrong number of scores and for scores that are not finite."""
        scores = list(self.function(rows, responses))
        if len(scores) != len(responses):
            raise UserError(f"{self.path} returned {len(scores)} scores for {len(responses)} responses; one each.")
        for row, score in zip(rows, scores, strict=True):
            if not isinstance(score, (int, float)) or not math.isfinite(score):
                raise UserError(f"{self.path} returned {score!r} for row {row['id']}; it must return finite numbers.")
        return [float(score) for score in scores]


def function_scorer(path: str) -> FunctionScorer:
    """Return the scorer behind ``module:name`` or a short name. Raises ``UserError`` when it cannot be imported."""
    return FunctionScorer(full_path(path, "score"), load_function(path))
