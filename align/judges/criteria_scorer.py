"""Criteria as scores, the same for training, ``evaluate`` and environments. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config.scores import RewardEntry
from align.config.verifiers import NO_ANSWER, SATISFIED, UNREADABLE, Criterion, VerifierFields
from align.data.final_answers import AnswerText, split_thought
from align.data.rows import Row, assistant
from align.data.scoring import Parts
from align.errors import UserError, shorten
from align.inference.requests import Answer, Request
from align.judges.client import Judge, JudgmentCaches, environment_judge, judge_request, stage_judge
from align.judges.criteria import (
    Decision,
    criteria_prompt,
    lowest_score,
    read_criteria,
    read_decisions,
    response_format,
    weighted_share,
)
from align.judges.prompts import fill_rubric
from align.judges.scorer import JudgeScorer
from align.verifiers.verdict import BadReference, reference_value

LONGEST_REASON = 500
"""Characters of a judge's reason in files."""
Ask = Callable[[Sequence[Request]], list[Answer]]
PROBE = [Criterion(criterion="The answer is one word.")]


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

    entry: VerifierFields
    retries: int = 0
    fallback: float | None = None
    """Score of a response whose replies cannot be read; None for the lowest possible score."""
    is_structured: bool = field(default=True, init=False)
    """True if the server restricts replies to a JSON schema."""

    @property
    def path(self) -> str:
        """Name in messages."""
        return "criteria"

    def check(self) -> None:
        """Ask the judge for a word, and find out whether it accepts a JSON schema.

        Raises ``UserError`` or ``EndpointLost`` for a judge that cannot be used.
        """
        # A checkpoint is sampled by transformers, which restricts no replies.
        self.is_structured = self.judge.is_server and not self._ask_ready(response_format(PROBE))
        if not self.is_structured:
            super().check()

    def score_parts(
        self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None
    ) -> Parts:
        """Return the scores under ``""``, and metrics by name. Equal responses are asked once.

        Raises as ``JudgeScorer.score_parts`` does, and ``UserError`` for a row whose criteria cannot be read.
        """
        judgments, unreadable = self._judge(rows, responses, self.judge.ask)
        if self.fallback is None:
            self._count(unreadable, len(judgments))
        parts: Parts = {
            "": [self._score(judgment) for judgment in judgments],
            SATISFIED: [_satisfied(judgment) for judgment in judgments],
            UNREADABLE: [float(_is_unreadable(judgment)) for judgment in judgments],
            NO_ANSWER: [float(judgment.is_empty) for judgment in judgments],
        }
        fixed = self.entry.criteria
        for index, criterion in enumerate([] if isinstance(fixed, str) or fixed is None else fixed):
            if criterion.name is not None:
                parts[criterion.name] = [_named(judgment, index) for judgment in judgments]
        return parts

    def explain(self, rows: Sequence[Row], responses: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Return the decisions on each response with the judge's reasons; of responses that were scored before."""
        judgments, _ = self._judge(rows, responses, self.judge.recall)
        return [
            [
                {
                    "criterion": criterion.criterion,
                    "weight": criterion.weight,
                    "satisfied": decision.is_satisfied,
                    "reason": shorten(decision.reason, LONGEST_REASON),
                }
                for criterion, decision in zip(judgment.criteria, judgment.decisions or (), strict=False)
            ]
            for judgment in judgments
        ]

    def _judge(self, rows: Sequence[Row], responses: Sequence[str], ask: Ask) -> tuple[list[Judgment], list[Answer]]:
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
            for index, reply in zip(unread, ask(requests) if requests else (), strict=True):
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
            item.model_copy(update={"criterion": fill_rubric(item.criterion, row, where, "a criterion")})
            for item in fixed
        ]

    def _score(self, judgment: Judgment) -> float:
        if judgment.decisions is not None:
            return weighted_share(judgment.criteria, [decision.is_satisfied for decision in judgment.decisions])
        if judgment.is_empty:
            return 0.0
        # The lowest score, so a response does not profit from confusing the judge.
        return lowest_score(judgment.criteria) if self.fallback is None else self.fallback


def _is_unreadable(judgment: Judgment) -> bool:
    return judgment.decisions is None and not judgment.is_empty


def _satisfied(judgment: Judgment) -> float:
    if judgment.decisions is None:
        return 0.0
    return sum(decision.is_satisfied for decision in judgment.decisions) / len(judgment.decisions)


def _named(judgment: Judgment, index: int) -> float:
    if judgment.decisions is None:
        return 0.0 if judgment.is_empty else math.nan
    return float(judgment.decisions[index].is_satisfied)


def criteria_scorer(entry: VerifierFields, caches: JudgmentCaches, place: str) -> CriteriaScorer:
    """Return the scorer of ``criteria`` by an endpoint. Raises ``UserError`` when the endpoint's key is not set."""
    assert entry.judge is not None
    return criteria_by(stage_judge(entry.judge, caches, place), entry, place)


def environment_criteria(entry: VerifierFields, place: str) -> CriteriaScorer:
    """Return the scorer of ``criteria`` of an environment, checked; raises as ``criteria_scorer`` and ``check`` do."""
    assert entry.judge is not None
    return criteria_by(environment_judge(entry.judge, place), entry, place)


def criteria_by(judge: Judge, entry: VerifierFields, place: str) -> CriteriaScorer:
    """Return the scorer of ``criteria`` by this judge."""
    assert entry.judge is not None
    retries = entry.retries if isinstance(entry, RewardEntry) else 0
    fallback = entry.fallback if isinstance(entry, RewardEntry) else None
    return CriteriaScorer(entry.judge, judge, place, entry, retries, fallback)
