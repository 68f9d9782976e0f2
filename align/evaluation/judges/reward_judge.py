"""An endpoint that grades responses as a reward: an entry ``judge`` of a list ``score:``. Torch-free.

Leaves out the sum with other rewards (``align.data.weighted_scores``).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from align.config.scores import RewardJudge
from align.data.rows import Row, assistant, user
from align.data.scoring import Parts
from align.errors import UserError, shorten
from align.evaluation.judges import judge_prompts as prompts
from align.evaluation.judges.client import NAME, QUOTED_CHARACTERS, JudgmentCaches, judge_request, open_client
from align.inference.cached_client import CachedClient
from align.inference.endpoint_client import Endpoint
from align.inference.requests import Answer, Request

READY = [user("Reply with the one word: ready")]
"""A test request, sent before anything expensive starts."""
MIN_JUDGMENTS = 32
"""Judgments before the share of unreadable ones counts: a batch of a few responses has no share to speak of."""


@dataclass
class JudgeScorer:
    """Scores responses by a judge's grade, from 0 to 1. ``unreadable`` is 1 for a grade that could not be read."""

    config: RewardJudge
    client: CachedClient
    endpoint: Endpoint
    place: str
    """Place of the entry in the YAML, for messages."""
    waits: bool = field(default=True, init=False)
    judgments: int = field(default=0, init=False)
    """Judgments of this process, and the unreadable ones among them."""
    unreadable: int = field(default=0, init=False)

    def check(self) -> None:
        """Ask the judge for a word. Raises ``UserError`` or ``EndpointLost`` for a judge that cannot be used."""
        answer = self.client.ask(
            self.endpoint, [judge_request(self.endpoint.identity, self.config, READY)], NAME, fresh=True
        )[0]
        if answer.error:
            raise UserError(f"{self.place}.judge.endpoint: the server {answer.error}.")

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Return one score per response; raises as ``score_parts`` does."""
        return self.score_parts(rows, responses, truncated)[""]

    def score_parts(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> Parts:
        """Return the scores under ``""``, and ``unreadable`` per response, 0 or 1. Equal responses are asked once.

        Raises ``UserError`` for a row without a column that is quoted, for a spent budget, and where more than
        ``max_unreadable`` of all judgments are unreadable; ``EndpointLost`` for a server that is gone. Judgments until
        then are cached.
        """
        requests = [
            judge_request(
                self.endpoint.identity,
                self.config,
                prompts.grade_prompt([*row["prompt"], assistant(response)], self._rubric(row), self._reference(row)),
            )
            for row, response in zip(rows, responses, strict=True)
        ]
        answers = self.client.ask(self.endpoint, requests, NAME)
        grades = [prompts.read_grade(answer.text) for answer in answers]
        self._check_readable([answer for answer, grade in zip(answers, grades, strict=True) if grade is None], requests)
        # An unreadable grade counts as the lowest one, and ``unreadable`` marks it.
        scale = prompts.MAX_GRADE - prompts.MIN_GRADE
        return {
            "": [0.0 if grade is None else (grade - prompts.MIN_GRADE) / scale for grade in grades],
            "unreadable": [float(grade is None) for grade in grades],
        }

    def usage(self) -> dict[str, Any]:
        """Return requests, tokens and cost of all attempts and processes of the stage so far."""
        return self.client.usage_of_stage(self.endpoint, NAME).to_json()

    def _rubric(self, row: Row) -> str:
        """Return the rubric for a response to this row, with the columns that it quotes."""
        return prompts.fill_rubric(
            self.config.rubric or prompts.GRADE_RUBRIC, row, f"{self.place}.judge.rubric: row {row['id']}"
        )

    def _reference(self, row: Row) -> str:
        column = self.config.reference
        if column is None:
            return ""
        value = row.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            columns = ", ".join(sorted(shorten(str(name)) for name in row))
            raise UserError(f"{self.place}.judge.reference: row {row['id']} has no '{column}'. Its columns: {columns}.")
        return str(value)

    def _check_readable(self, unreadable: list[Answer], requests: list[Request]) -> None:
        self.judgments += len(requests)
        self.unreadable += len(unreadable)
        if self.unreadable <= self.config.max_unreadable * max(self.judgments, MIN_JUDGMENTS):
            return
        example = next((answer for answer in unreadable if answer.text.strip()), unreadable[0])
        text = example.error or example.text
        # Quoted as ASCII JSON, so that no control character of a reply acts on the terminal.
        quoted = json.dumps(text[:QUOTED_CHARACTERS]) + (" …" if len(text) > QUOTED_CHARACTERS else "")
        raise UserError(
            f"{self.place}: the judge {self.endpoint.config.model} gave no readable grade in {self.unreadable} of "
            f"{self.judgments} judgments; max_unreadable is {self.config.max_unreadable:g}. An example: {quoted}. Take "
            "a judge that can answer in this form, raise judge.max_tokens where grades are cut off, or raise "
            f"judge.max_unreadable. To ask a repaired server again, set judge.seed: {self.config.seed + 1}."
        )


def judge_scorer(config: RewardJudge, caches: JudgmentCaches, place: str, processes: int = 1) -> JudgeScorer:
    """Return the scorer of an entry ``judge``. Raises ``UserError`` when the endpoint's key is not set."""
    assert config.endpoint is not None
    # A request that the server rejects (a content filter, a length) costs one grade, not the run.
    endpoint = Endpoint(config.endpoint, drop=True, place=f"{place}.judge.endpoint")
    return JudgeScorer(config, open_client(config, caches, processes=processes), endpoint, place)
