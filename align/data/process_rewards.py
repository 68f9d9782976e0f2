"""Process rewards: one score per step of a response. Torch-free.

A step is a part of the answer between two separators, or a text that the function that scores returns with its score.
Leaves out the tokens on which the scores are placed (``align.rl.step_rewards``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from align.errors import shorten


class StepScore(NamedTuple):
    """The score of one step."""

    end: int
    """Character of the answer after the step's last one."""
    score: float


class StepParts(dict[str, list[float]]):
    """``Parts`` (``align.data.scoring``) of a scorer that also scores steps, whose scores are part of its scores."""

    def __init__(self, parts: Mapping[str, list[float]], steps: list[list[StepScore]]) -> None:
        """``steps`` has the scores of the steps of each response, none for a response that is scored as a whole."""
        super().__init__(parts)
        self.steps = steps


class WrongSteps(ValueError):
    """Scores that do not fit the steps of a response; the text completes "it returned"."""


def split_steps(answer: str, separator: str) -> list[tuple[int, int]]:
    """Return the place of each step of an answer: its first character, and the one after its last.

    A step is a part between two separators that is not only white space. White space around it is not part of it.
    """
    places = []
    start = 0
    for part in answer.split(separator):
        text = part.strip()
        if text:
            first = start + part.index(text)
            places.append((first, first + len(text)))
        start += len(part) + len(separator)
    return places


def read_steps(answer: str, separator: str, values: Sequence[Any]) -> list[StepScore]:
    """Return the scores of an answer's steps.

    ``values`` has a number for each step of ``split_steps``, or pairs of a step's text and a number, in the order of
    the texts in the answer. Raises ``WrongSteps`` for anything else.
    """
    if values and all(isinstance(value, (list, tuple)) for value in values):
        return _place_texts(answer, values)
    places = split_steps(answer, separator)
    if len(values) != len(places):
        raise WrongSteps(f"{len(values)} scores for {len(places)} steps")
    return [StepScore(end, _finite(value)) for (_, end), value in zip(places, values, strict=True)]


def _place_texts(answer: str, pairs: Sequence[Any]) -> list[StepScore]:
    steps = []
    start = 0
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise WrongSteps(f"{shorten(repr(pair))}, which is no pair of a text and a number")
        text = pair[0].strip()
        # Search after the step before, because steps may have equal texts.
        position = answer.find(text, start) if text else -1
        if position < 0:
            raise WrongSteps(f"the step {shorten(repr(pair[0]))}, which does not occur after the step before it")
        start = position + len(text)
        steps.append(StepScore(start, _finite(pair[1])))
    return steps


def _finite(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise WrongSteps(f"{shorten(repr(value))} for a step, which is no finite number")
    return float(value)


def add_steps(steps: list[list[StepScore]] | None, more: list[list[StepScore]], weight: float) -> list[list[StepScore]]:
    """Return the steps of each response with those of another part, times its weight."""
    weighted = [[StepScore(step.end, weight * step.score) for step in response] for response in more]
    if steps is None:
        return weighted
    return [[*earlier, *later] for earlier, later in zip(steps, weighted, strict=True)]
