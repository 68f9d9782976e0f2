"""Opens the rewards that a stage's ``score:`` names, before anything expensive starts, and adds their weighted scores.

The same for every stage that scores: sample, synthesize, evaluate and those that learn from their own responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from align.config.scores import MetricFunction, RewardEntry
from align.data.rows import Row
from align.judges.checkpoint import CheckpointJudge
from align.judges.client import CachedJudge, JudgmentCaches, stage_judge
from align.pipeline.context import StageContext
from align.scoring.functions import function_scorer
from align.scoring.judges import JudgeScorer, judge_scorer
from align.scoring.models import RewardScorer, load_checkpoint
from align.scoring.scored import Scored, Scorer, StepScore
from align.scoring.verifiers import open_verifier
from align.store.artifacts import Artifact

if TYPE_CHECKING:
    from align.models.reward import RewardModel

REWARD_INPUTS = "score.reward"
"""Name of the reward stages of a list among a stage's inputs."""
JUDGE_INPUTS = "score.judge.model"
"""Name of the stages whose checkpoints judge among a stage's inputs."""
FUNCTION = "function"
"""Name of the function if ``score`` is a text, in logs of stages that also have a reward model."""


@dataclass(frozen=True)
class Part:
    """One term of a sum of scores."""

    name: str
    weight: float
    scorer: Scorer


@dataclass(frozen=True)
class WeightedSum(Scorer):
    """The sum of ``weight * score`` over ``parts``."""

    parts: tuple[Part, ...]
    is_list: bool = False
    """True for parts that the user has named in a list: then even a single part is told by its name."""

    @property
    def names(self) -> list[str]:
        """Names of the parts whose scores are reported with their sum; none for a single part, which is the sum."""
        return [part.name for part in self.parts] if self.is_list or len(self.parts) > 1 else []

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return the sum, and what each part returned."""
        results = self._score_each(rows, responses, truncated)
        total = [0.0] * len(responses)
        steps: list[list[StepScore]] = [[] for _ in responses]
        for part, scored in zip(self.parts, results, strict=True):
            for index, score in enumerate(scored.total):
                total[index] += part.weight * score
            for response_steps, more in zip(steps, scored.steps or (), strict=False):
                response_steps += [StepScore(step.end, part.weight * step.score) for step in more]
        summed = Scored(total, steps=None if all(scored.steps is None for scored in results) else steps)
        if self.names:
            summed.parts = {part.name: scored for part, scored in zip(self.parts, results, strict=True)}
        else:
            summed.metrics = results[0].columns_of(self.parts[0].name)
        return summed

    def facts(self) -> dict[str, Any]:
        """Return ``judges``: requests, tokens and cost of each judge by name; and ``sandboxes``: the level of each."""
        facts: dict[str, dict[str, Any]] = {}
        for part in self.parts:
            for topic, fact in part.scorer.facts().items():
                facts.setdefault(topic, {})[part.name] = fact
        return facts

    def close(self) -> None:
        """Free the reward models and judges that were loaded late."""
        for part in self.parts:
            part.scorer.close()

    def _score_each(
        self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None
    ) -> list[Scored]:
        """Return the scores of each part. Async functions and judges wait at the same time, in threads."""
        waiting = [index for index, part in enumerate(self.parts) if part.scorer.waits]
        with ThreadPoolExecutor(max(1, len(waiting))) as pool:
            futures: dict[int, Future[Scored]] = {
                index: pool.submit(self.parts[index].scorer.score, rows, responses, truncated) for index in waiting
            }
            # The others compute meanwhile in this thread, where torch's settings hold.
            return [
                futures[index].result() if index in futures else part.scorer.score(rows, responses, truncated)
                for index, part in enumerate(self.parts)
            ]


def open_score(context: StageContext) -> WeightedSum | None:
    """Return the scorer of a stage's ``score``, or else of its ``reward``; None if it has neither.

    Raises as ``open_parts`` does.
    """
    score = context.config.score
    parts = open_parts(context)
    if score is None and context.config.reward is not None:
        parts = (Part("reward", 1.0, _reward_scorer(context, context.artifact("reward"), None)),)
    return WeightedSum(parts, isinstance(score, list)) if parts else None


def open_parts(
    context: StageContext, load: Callable[[Artifact], RewardModel] | None = None, processes: int = 1
) -> tuple[Part, ...]:
    """Return the parts of ``context.config.score``: a part for a text, a part per entry of a list, none for null.

    Every function is imported and its arguments are checked, and every judge is asked for a word. ``load`` loads a
    reward stage's model, at its first score. ``processes`` of the stage share the judges' budgets. Raises ``UserError``
    for what cannot be used, ``EndpointLost`` for a judge that is out of order.
    """
    score: str | list[RewardEntry] | None = context.config.score
    if score is None:
        return ()
    if isinstance(score, str):
        return (_counting(context, Part(FUNCTION, 1.0, function_scorer(score, label=score.rpartition(":")[2]))),)
    artifacts = _inputs_by_entry(context, score)
    parts = []
    for index, entry in enumerate(score):
        place = f"score[{index}]"
        # A stage cache for each judge, so each counts what it costs.
        caches = JudgmentCaches(context.checkpoints / f"score-{entry.label}", context.cache, context.warn)
        reward = checkpoint = None
        if entry.reward is not None:
            reward = _reward_scorer(context, artifacts[index], load)
        elif index in artifacts:
            checkpoint = CheckpointJudge(
                artifacts[index], context.runtime, context.precision, place, context.fail_at_once
            )
        scorer = open_entry(entry, place, caches, reward=reward, checkpoint=checkpoint, processes=processes)
        parts.append(_counting(context, Part(entry.label, entry.weight, scorer)))
    # Last, so a misspelled function costs no request.
    for part in parts:
        part.scorer.check()
    return tuple(parts)


def _counting(context: StageContext, part: Part) -> Part:
    """Return a part that reports counts while it scores. A function that gets a whole batch has none."""

    def report(done: int, total: int, tokens: int = 0) -> None:
        context.phase(f"scoring {done}/{total} by '{part.name}'")

    scorer = part.scorer
    if isinstance(scorer, JudgeScorer) and isinstance(scorer.judge, CachedJudge):
        scorer.judge.client.on_progress = report
    elif not isinstance(scorer, RewardScorer):
        scorer.report = report
    return part


def _inputs_by_entry(context: StageContext, entries: Sequence[RewardEntry]) -> dict[int, Artifact]:
    """Return the artifacts of the stages that entries name, by the number of the entry."""
    rewards = [index for index, entry in enumerate(entries) if entry.reward is not None]
    judges = [index for index, entry in enumerate(entries) if entry.judge is not None and entry.judge.model is not None]
    fields = ((REWARD_INPUTS, rewards), (JUDGE_INPUTS, judges))
    return {
        index: artifact
        for field, indices in fields
        for index, artifact in zip(indices, context.inputs.get(field) or (), strict=True)
    }


def _reward_scorer(
    context: StageContext, artifact: Artifact, load: Callable[[Artifact], RewardModel] | None
) -> RewardScorer:
    if load is None:
        scorer = RewardScorer(partial(load_checkpoint, artifact.model, context.runtime, context.precision))
    else:
        scorer = RewardScorer(partial(load, artifact))
    scorer.report = lambda done, total: context.phase(f"scoring {done}/{total} by '{artifact.stage}'")
    return scorer


def open_entry(
    entry: RewardEntry,
    place: str,
    caches: JudgmentCaches | None = None,
    *,
    reward: RewardScorer | None = None,
    checkpoint: CheckpointJudge | None = None,
    processes: int = 1,
) -> Scorer:
    """Return the scorer of an entry, whose ``place`` begins messages.

    ``caches`` are for an entry with a judge, ``reward`` is the scorer of a reward stage, and ``checkpoint`` judges in
    place of an endpoint. Raises ``UserError`` for what cannot be used.
    """
    if entry.function is not None:
        return function_scorer(
            entry.function,
            entry.arguments,
            concurrency=entry.concurrency,
            place=place,
            label=entry.label,
            retries=entry.retries,
            on_error=entry.fallback,
            steps=entry.steps,
            timeout=entry.timeout,
        )
    if entry.judge is not None:
        assert caches is not None
        return judge_scorer(stage_judge(entry.judge, caches, place, processes, checkpoint), entry, place)
    if entry.verifier is not None:
        return open_verifier(entry, place)
    assert reward is not None
    return reward


def open_metric(context: StageContext, settings: MetricFunction, place: str) -> Scorer:
    """Return the scorer of a metric of ``evaluate``; raises as ``open_parts`` does."""
    if settings.function is not None:
        return function_scorer(settings.function, settings.arguments, place=place, label=settings.metric)
    if settings.judge is None:
        return open_verifier(settings, place)
    caches = JudgmentCaches(context.checkpoints / f"metric-{settings.metric}", context.cache, context.warn)
    scorer = judge_scorer(stage_judge(settings.judge, caches, place), settings, place)
    scorer.check()
    return scorer
