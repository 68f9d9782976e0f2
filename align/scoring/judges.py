"""Judges as scorers: grades from 1 to 10, and decisions on criteria. Torch-free.

The same for training, ``evaluate`` and environments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from align.config.endpoint import RewardJudge
from align.config.scores import RewardEntry
from align.config.verifiers import NO_ANSWER, SATISFIED, UNREADABLE, Criterion, VerifierFields
from align.data.final_answers import AnswerText, split_thought
from align.data.rows import Row, assistant
from align.errors import UserError, shorten
from align.inference.requests import Answer, Request
from align.judges import prompts
from align.judges.client import READY, Judge, judge_request, unreadable_remedy
from align.judges.criteria import (
    Decision,
    criteria_prompt,
    lowest_score,
    read_criteria,
    read_decisions,
    response_format,
    weighted_share,
)
from align.scoring.scored import Kind, Scored, Scorer
from align.verifiers.verdict import BadReference, reference_value

MIN_JUDGMENTS = 32
"""Judgments before the share of unreadable ones counts: a batch of a few responses has no share to speak of."""
LONGEST_REASON = 500
"""Characters of a judge's reason in files."""
PROBE = [Criterion(criterion="The answer is one word.")]


@dataclass
class JudgeScorer(Scorer):
    """Scores responses by a judge. A subclass says what the judge is asked and how its reply is read.

    Equal responses are asked once. ``score`` raises ``UserError`` for a row without a column that is quoted, for a
    spent budget, and if more than ``max_unreadable`` of all judgments are unreadable; ``EndpointLost`` for a server
    that is gone. Judgments until then are cached.
    """

    path: ClassVar[str] = "judge"
    """Name in messages."""
    config: RewardJudge
    judge: Judge
    place: str
    """Place of the entry in the YAML, for messages."""
    judgments: int = field(default=0, init=False)
    """Judgments of this process, and the unreadable ones among them."""
    unreadable: int = field(default=0, init=False)

    @property
    def kind(self) -> Kind:
        """A checkpoint is validated like a reward model."""
        return "judge" if self.waits else "model"

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

    def close(self) -> None:
        """Free a judge that is a checkpoint; another judgment would load it again."""
        self.judge.close()

    def facts(self) -> dict[str, Any]:
        """Return requests, tokens and cost of all attempts and processes of the stage so far."""
        return {"judges": self.judge.usage()}

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

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return the scores, and ``unreadable`` per response, 0 or 1."""
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
        return Scored(
            [0.0 if grade is None else (grade - prompts.MIN_GRADE) / scale for grade in grades],
            metrics={UNREADABLE: [float(grade is None) for grade in grades]},
        )

    def _rubric(self, row: Row) -> str:
        """Return the rubric for a response to this row, with the columns that it quotes."""
        return prompts.fill_rubric(
            self.config.rubric or prompts.GRADE_RUBRIC, row, f"{self.place}.judge.rubric: row {row['id']}"
        )


@dataclass(frozen=True)
class Judgment:
    """The judgment on one response."""

    criteria: list[Criterion]
    decisions: list[Decision] | None
    """Decisions on the criteria; None if no reply could be read, and for an empty answer."""
    is_empty: bool
    """True for an empty answer, on which the judge is not asked."""


@dataclass
class CriteriaScorer(JudgeScorer):
    """Scores responses by the weighted share of the criteria that they satisfy, in the judge's opinion.

    Metrics of each response: ``satisfied``, the share without weights; ``unreadable`` and ``no_answer``, 0 or 1; and of
    criteria with a name whether it is satisfied.
    """

    path: ClassVar[str] = "criteria"
    entry: VerifierFields
    retries: int = 0
    fallback: float | None = None
    """Score of a response whose replies cannot be read; None for the lowest possible score."""
    is_structured: bool = field(default=True, init=False)
    """True if the server restricts replies to a JSON schema."""

    def check(self) -> None:
        """Ask the judge for a word, and find out whether it accepts a JSON schema.

        Raises ``UserError`` or ``EndpointLost`` for a judge that cannot be used.
        """
        # A checkpoint is sampled by transformers, which restricts no replies.
        self.is_structured = self.judge.is_server and not self._ask_ready(response_format(PROBE))
        if not self.is_structured:
            super().check()

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return the scores, metrics by name, and the decisions with the judge's reasons.

        Raises ``UserError`` for a row whose criteria cannot be read.
        """
        judgments, unreadable = self._judge(rows, responses)
        if self.fallback is None:
            self._count(unreadable, len(judgments))
        metrics = {
            SATISFIED: [_satisfied(judgment) for judgment in judgments],
            UNREADABLE: [float(judgment.decisions is None and not judgment.is_empty) for judgment in judgments],
            NO_ANSWER: [float(judgment.is_empty) for judgment in judgments],
        }
        fixed = self.entry.criteria
        for index, criterion in enumerate([] if isinstance(fixed, str) or fixed is None else fixed):
            if criterion.name is not None:
                metrics[criterion.name] = [_named(judgment, index) for judgment in judgments]
        total = [self._score(judgment) for judgment in judgments]
        return Scored(total, metrics=metrics, reasons=list(map(_reasons, judgments)))

    def _judge(self, rows: Sequence[Row], responses: Sequence[str]) -> tuple[list[Judgment], list[Answer]]:
        """Return the judgments, and replies that cannot be read, a reply for each response without a readable reply."""
        criteria = [self._criteria(row) for row in rows]
        # Texts of rows, such as reference answers, were not sampled and are split here.
        answers = [text if isinstance(text, AnswerText) else split_thought(text) for text in responses]
        decisions: dict[int, list[Decision]] = {}
        unread = [index for index, answer in enumerate(answers) if answer.strip()]
        replies: dict[int, Answer] = {}
        # Ask again only about replies that could not be read. The number of the attempt is part of the request, so no
        # cache answers it with the old reply.
        for attempt in range(self.retries + 1):
            requests = [self._request(rows[i], answers[i], criteria[i], attempt) for i in unread]
            for index, reply in zip(unread, self.judge.ask(requests) if requests else (), strict=True):
                replies[index] = reply
                read = None if reply.error or not reply.finished else read_decisions(reply.text, criteria[index])
                if read is not None:
                    decisions[index] = read
            unread = [index for index in unread if index not in decisions]
        judgments = [
            Judgment(criteria[index], decisions.get(index), not answer.strip()) for index, answer in enumerate(answers)
        ]
        return judgments, [replies[index] for index in unread]

    def _request(self, row: Row, answer: str, criteria: list[Criterion], attempt: int) -> Request:
        messages = criteria_prompt([*row["prompt"], assistant(answer)], criteria, self._reference(row))
        form = response_format(criteria) if self.is_structured else ""
        return judge_request(self.judge.identity, self.config, messages, sample=attempt, response_format=form)

    def _criteria(self, row: Row) -> list[Criterion]:
        fixed = self.entry.criteria
        assert fixed is not None
        place = f"{self.place}.criteria"
        if isinstance(fixed, str):
            value = reference_value(row, fixed, place)
            try:
                return read_criteria(value)
            except BadReference as error:
                raise UserError(
                    f"{place}: row {row.get('id', '')}: '{fixed}' {error}: {shorten(repr(value), 80)}. Write a list of "
                    "texts, or of {criterion: ..., weight: ...}."
                ) from None
        where = f"{place}: row {row.get('id', '')}"
        return [
            item.model_copy(update={"criterion": prompts.fill_rubric(item.criterion, row, where, "a criterion")})
            for item in fixed
        ]

    def _score(self, judgment: Judgment) -> float:
        if judgment.decisions is not None:
            return weighted_share(judgment.criteria, [decision.is_satisfied for decision in judgment.decisions])
        if judgment.is_empty:
            return 0.0
        # The lowest score, so a response does not profit from confusing the judge.
        return lowest_score(judgment.criteria) if self.fallback is None else self.fallback


def _reasons(judgment: Judgment) -> list[dict[str, Any]]:
    return [
        {
            "criterion": criterion.criterion,
            "weight": criterion.weight,
            "satisfied": decision.is_satisfied,
            "reason": shorten(decision.reason, LONGEST_REASON),
        }
        for criterion, decision in zip(judgment.criteria, judgment.decisions or (), strict=False)
    ]


def _satisfied(judgment: Judgment) -> float:
    if judgment.decisions is None:
        return 0.0
    return sum(decision.is_satisfied for decision in judgment.decisions) / len(judgment.decisions)


def _named(judgment: Judgment, index: int) -> float:
    if judgment.decisions is None:
        return 0.0 if judgment.is_empty else math.nan
    return float(judgment.decisions[index].is_satisfied)


def judge_scorer(judge: Judge, entry: VerifierFields, place: str) -> JudgeScorer:
    """Return the scorer that asks about the entry's criteria, or that grades."""
    assert entry.judge is not None
    if entry.criteria is None:
        return GradeScorer(entry.judge, judge, place)
    if isinstance(entry, RewardEntry):
        return CriteriaScorer(entry.judge, judge, place, entry, entry.retries, entry.fallback)
    return CriteriaScorer(entry.judge, judge, place, entry)
