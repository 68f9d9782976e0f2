"""Judges as scorers of responses: what grades and criteria have in common, and grades from 1 to 10. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config.endpoint import RewardJudge
from align.config.verifiers import UNREADABLE
from align.data.rows import Row, assistant
from align.data.scoring import Parts
from align.errors import UserError, shorten
from align.inference.requests import Answer
from align.judges import prompts
from align.judges.client import READY, Judge, judge_request, unreadable_remedy

MIN_JUDGMENTS = 32
"""Judgments before the share of unreadable ones counts: a batch of a few responses has no share to speak of."""


@dataclass
class JudgeScorer:
    """Scores responses by a judge. A subclass says what the judge is asked and how its reply is read."""

    config: RewardJudge
    judge: Judge
    place: str
    """Place of the entry in the YAML, for messages."""
    judgments: int = field(default=0, init=False)
    """Judgments of this process, and the unreadable ones among them."""
    unreadable: int = field(default=0, init=False)

    @property
    def waits(self) -> bool:
        """True for a server, whose answers are waited for while other rewards are computed."""
        return self.judge.is_server

    def check(self) -> None:
        """Ask a server for a word. Raises ``UserError`` or ``EndpointLost`` for a judge that cannot be used."""
        error = self._ask_ready() if self.judge.is_server else ""
        if error:
            raise UserError(f"{self.place}.judge.endpoint: the server {error}.")

    def _ask_ready(self, response_format: str = "") -> str:
        """Ask the judge for a word; return the reason if it refuses."""
        request = judge_request(self.judge.identity, self.config, READY, response_format=response_format)
        return self.judge.ask([request], fresh=True)[0].error

    def score(
        self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None
    ) -> list[float]:
        """Return one score per response; raises as ``score_parts`` does."""
        return self.score_parts(rows, responses, truncated)[""]

    def score_parts(
        self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None
    ) -> Parts:
        """Return the scores under ``""``, and metrics by name.

        Raises ``UserError`` for a row without a column that is quoted, for a spent budget, and if more than
        ``max_unreadable`` of all judgments are unreadable; ``EndpointLost`` for a server that is gone. Judgments until
        then are cached.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free a judge that is a checkpoint; another judgment would load it again."""
        self.judge.close()

    def usage(self) -> dict[str, Any]:
        """Return requests, tokens and cost of all attempts and processes of the stage so far."""
        return self.judge.usage()

    def _reference(self, row: Row) -> str:
        column = self.config.reference
        if column is None:
            return ""
        value = row.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            columns = ", ".join(sorted(shorten(str(name)) for name in row))
            raise UserError(f"{self.place}.judge.reference: row {row['id']} has no '{column}'. Its columns: {columns}.")
        return str(value)

    def _count(self, unreadable: list[Answer], judgments: int) -> None:
        """Count judgments. Raises ``UserError`` if too many of all judgments are unreadable."""
        self.judgments += judgments
        self.unreadable += len(unreadable)
        if self.unreadable <= self.config.max_unreadable * max(self.judgments, MIN_JUDGMENTS):
            return
        raise UserError(
            f"{self.place}: the judge {self.judge.name} gave no readable grade in {self.unreadable} of "
            f"{self.judgments} judgments; max_unreadable is {self.config.max_unreadable:g}. "
            f"{unreadable_remedy(self.config, unreadable)}"
        )


class GradeScorer(JudgeScorer):
    """Scores responses by a judge's grade, from 0 to 1. ``unreadable`` is 1 for a grade that could not be read."""

    def score_parts(
        self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None
    ) -> Parts:
        """Return the scores under ``""``, and ``unreadable`` per response, 0 or 1. Equal responses are asked once.

        Raises as ``JudgeScorer.score_parts`` does.
        """
        requests = [
            judge_request(
                self.judge.identity,
                self.config,
                prompts.grade_prompt([*row["prompt"], assistant(response)], self._rubric(row), self._reference(row)),
            )
            for row, response in zip(rows, responses, strict=True)
        ]
        answers = self.judge.ask(requests)
        grades = [prompts.read_grade(answer.text) for answer in answers]
        self._count([answer for answer, grade in zip(answers, grades, strict=True) if grade is None], len(requests))
        # An unreadable grade counts as the lowest one, and ``unreadable`` marks it.
        scale = prompts.MAX_GRADE - prompts.MIN_GRADE
        return {
            "": [0.0 if grade is None else (grade - prompts.MIN_GRADE) / scale for grade in grades],
            UNREADABLE: [float(grade is None) for grade in grades],
        }

    def _rubric(self, row: Row) -> str:
        """Return the rubric for a response to this row, with the columns that it quotes."""
        return prompts.fill_rubric(
            self.config.rubric or prompts.GRADE_RUBRIC, row, f"{self.place}.judge.rubric: row {row['id']}"
        )
