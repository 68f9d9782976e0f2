"""The record that every scorer returns, the base class of scorers, and the scores of single steps. Torch-free.

A step is a part of the answer between two separators, or a text that a function returns with its score. Excluded: the
tokens on which the scores of steps are placed (``align.rl.scores``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from align.data.rows import Row
from align.errors import UserError, shorten

Kind = Literal["verifier", "format", "function", "judge", "model"]
"""Kind of a scorer, which decides how it is validated. A verifier of a form, such as a regex, is a ``format``."""


class StepScore(NamedTuple):
    """The score of one step."""

    end: int
    """Character of the answer after the step's last one."""
    score: float


@dataclass
class Scored:
    """Scores of some responses. Every list is in the order of the responses."""

    total: list[float]
    """The scores. Those of steps are part of them."""
    parts: dict[str, Scored] = field(default_factory=dict)
    """Scores by each reward of a list, without their weights, by name."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Further numbers by name; NaN for a response that lacks one."""
    steps: list[list[StepScore]] | None = None
    """Scores of the steps of each response, none for a response that is scored as a whole; None without steps."""
    reasons: list[list[dict[str, Any]]] = field(default_factory=list)
    """A judge's decisions on each response, with its reasons; empty without any."""

    def columns(self) -> dict[str, list[float]]:
        """Return the scores of the parts by name, their metrics as ``name_metric``, and the other metrics.

        Raises ``UserError`` if two parts give the same name.
        """
        columns: dict[str, list[float]] = {}
        for name, part in self.parts.items():
            new_columns = {name: part.total, **part.columns_of(name)}
            repeated = sorted(columns.keys() & new_columns.keys())
            if repeated:
                raise UserError(f"score: two rewards give '{repeated[0]}'; set another `name` for one of them.")
            columns |= new_columns
        return columns | self.metrics

    def columns_of(self, name: str) -> dict[str, list[float]]:
        """Return the metrics as ``name_metric``."""
        return {f"{name}_{metric}": values for metric, values in self.metrics.items()}

    def explanations(self) -> list[dict[str, Any]]:
        """Return the reasons of the parts' judges for each response, by part; empty if there are none."""
        told = {name: part.reasons for name, part in self.parts.items() if any(part.reasons)}
        return [
            {name: decisions for name, decisions in zip(told, response, strict=True) if decisions}
            for response in zip(*told.values(), strict=True)
        ]


class Scorer:
    """An object that scores responses: a function, a verifier, a judge, a reward model, or a weighted list of them."""

    report: Callable[[int, int], None] | None = None
    """Gets the number of responses that were scored, and of all, from scorers that need time."""

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return the scores of ``responses`` to ``rows``; ``truncated`` marks those that hit the length limit.

        Raises ``UserError`` for rows and results that cannot be used.
        """
        raise NotImplementedError

    @property
    def kind(self) -> Kind:
        """The scorer's kind."""
        return "model"

    @property
    def waits(self) -> bool:
        """True if the time is mostly spent waiting, so other rewards may be computed meanwhile."""
        return False

    def check(self) -> None:
        """Ask a server for a word. Raises ``UserError`` or ``EndpointLost`` for a scorer that cannot be used."""

    def check_references(self, rows: Sequence[Row]) -> None:
        """Read the references of all rows. Raises ``UserError`` for a reference that a verifier cannot use."""

    def open(self) -> None:
        """Load a reward model, which otherwise happens when it scores for the first time."""

    def close(self) -> None:
        """Free what was loaded; another score would load it again."""

    def facts(self) -> dict[str, Any]:
        """Return facts for the stage's record, by topic."""
        return {}


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


class WrongSteps(ValueError):
    """Scores that do not fit the steps of a response; the text completes "it returned"."""


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
