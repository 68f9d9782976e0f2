"""Builds what a stage's ``score:`` names, and checks it, before anything expensive starts. Torch-free.

The same for every stage that scores: sample, synthesize, evaluate and those that learn from their own responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from align.config.scores import RewardEntry, RewardJudge
from align.data.rows import Row, assistant, user
from align.data.scoring import Part, Parts, RewardScorer, Scorer, WeightedSum, function_scorer
from align.errors import UserError, shorten
from align.evaluation import judge as prompts
from align.evaluation.judge import NAME, JudgmentCaches, judge_request, open_client, unreadable_remedy
from align.inference.cached_client import CachedClient
from align.inference.endpoint_client import Endpoint
from align.inference.requests import Answer, Request
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact
from align.verifiers.scorer import VerifierScorer, open_verifier

REWARD_INPUTS = "score.reward"
"""Name of the reward stages of a list among a stage's inputs."""
FUNCTION = "function"
"""Name of the function if ``score`` is a text, in logs of stages that also have a reward model."""
LoadReward = Callable[[Artifact], Scorer]
READY = [user("Reply with the one word: ready")]
"""A test request, sent before anything expensive starts."""
MIN_JUDGMENTS = 32
"""Judgments before the share of unreadable ones counts: a batch of a few responses has no share to speak of."""


@dataclass
class LateScorer:
    """A reward model that is loaded when it scores for the first time: until then an engine needs the memory."""

    load: Callable[[], Scorer]
    _scorer: Scorer | None = field(default=None, init=False)

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Return one score per response."""
        if self._scorer is None:
            self._scorer = self.load()
        return self._scorer.score(rows, responses, truncated)

    def close(self) -> None:
        """Free the reward model; another score would load it again."""
        self._scorer = None


def open_score(context: StageContext) -> WeightedSum:
    """Return the scorer of ``context.config.score``; raises as ``open_rewards`` does."""
    return WeightedSum(open_rewards(context, load_late(context)), isinstance(context.config.score, list))


def open_rewards(context: StageContext, load_reward: LoadReward, processes: int = 1) -> tuple[Part, ...]:
    """Return the parts of ``context.config.score``: a part for a text, a part per entry of a list, none for null.

    Every function is imported and its arguments are checked, and every judge is asked for a word. ``processes`` of the
    stage share the judges' budgets. Raises ``UserError`` for what cannot be used, ``EndpointLost`` for a judge that is
    out of order.
    """
    score: str | list[RewardEntry] | None = context.config.score
    if score is None:
        return ()
    if isinstance(score, str):
        return (Part(FUNCTION, 1.0, function_scorer(score, label=score.rpartition(":")[2])),)
    artifacts = iter(context.inputs.get(REWARD_INPUTS) or ())
    parts = []
    for index, entry in enumerate(score):
        place = f"score[{index}]"
        scorer: Scorer
        if entry.function is not None:
            scorer = function_scorer(
                entry.function,
                entry.arguments,
                concurrency=entry.concurrency,
                place=place,
                label=entry.label,
                retries=entry.retries,
                on_error=entry.fallback,
            )
        elif entry.judge is not None:
            # A stage cache for each judge, so each counts what it costs.
            caches = JudgmentCaches(context.checkpoints / f"score-{entry.label}", context.cache, context.warn)
            scorer = judge_scorer(entry.judge, caches, place, processes)
        elif entry.verifier is not None:
            scorer = open_verifier(entry, place)
        else:
            scorer = load_reward(next(artifacts))
        parts.append(Part(entry.label, entry.weight, scorer))
    # Last, so a misspelled function costs no request.
    for part in parts:
        if isinstance(part.scorer, JudgeScorer):
            part.scorer.check()
    return tuple(parts)


def score_facts(parts: tuple[Part, ...]) -> dict[str, Any]:
    """Return ``judges``: requests, tokens and cost of each judge by name; and ``sandboxes``: the level of each."""
    usage = {part.name: part.scorer.usage() for part in parts if isinstance(part.scorer, JudgeScorer)}
    scorers = [(part.name, part.scorer) for part in parts if isinstance(part.scorer, VerifierScorer)]
    levels = {name: scorer.sandbox.level for name, scorer in scorers if scorer.sandbox is not None}
    return {**({"judges": usage} if usage else {}), **({"sandboxes": levels} if levels else {})}


def close_rewards(parts: tuple[Part, ...]) -> None:
    """Free the reward models that were loaded late."""
    for part in parts:
        if isinstance(part.scorer, LateScorer):
            part.scorer.close()


def load_late(context: StageContext) -> LoadReward:
    """Return a function that loads a reward stage's checkpoint when it scores for the first time."""

    def load(artifact: Artifact) -> Scorer:
        def load_model() -> Scorer:
            from align.models.compute.processes import device_of, use_threads
            from align.models.reward import RewardModel

            use_threads(context.runtime)
            return RewardScorer(RewardModel(artifact.model, device_of(context.runtime), context.precision))

        return LateScorer(load_model)

    return load


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

        Raises ``UserError`` for a row without a column that is quoted, for a spent budget, and if more than
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
        raise UserError(
            f"{self.place}: the judge {self.endpoint.config.model} gave no readable grade in {self.unreadable} of "
            f"{self.judgments} judgments; max_unreadable is {self.config.max_unreadable:g}. "
            f"{unreadable_remedy(self.config, unreadable)}"
        )


def judge_scorer(config: RewardJudge, caches: JudgmentCaches, place: str, processes: int = 1) -> JudgeScorer:
    """Return the scorer of an entry ``judge``. Raises ``UserError`` when the endpoint's key is not set."""
    assert config.endpoint is not None
    # A request that the server rejects (a content filter, a length) costs one grade, not the run.
    endpoint = Endpoint(config.endpoint, drop=True, place=f"{place}.judge.endpoint")
    return JudgeScorer(config, open_client(config, caches, processes=processes), endpoint, place)
