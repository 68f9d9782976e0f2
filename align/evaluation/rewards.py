"""Builds what a stage's ``score:`` names, and checks it, before anything expensive starts. Torch-free.

The same for every stage that scores: sample, synthesize, evaluate and those that learn from their own responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.config.base import PrecisionSetting
from align.config.runtime import Runtime
from align.config.scores import MetricFunction, RewardEntry
from align.data.ensembles import RewardScorer
from align.data.rows import Row
from align.data.scoring import FunctionScorer, Part, Scorer, WeightedSum, function_scorer
from align.judges.checkpoint import CheckpointJudge
from align.judges.client import CachedJudge, Judge, JudgmentCaches, checkpoint_judge, stage_judge
from align.judges.criteria_scorer import CriteriaScorer, criteria_by, criteria_scorer
from align.judges.scorer import GradeScorer, JudgeScorer
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact
from align.verifiers.scorer import VerifierScorer, open_verifier

REWARD_INPUTS = "score.reward"
"""Name of the reward stages of a list among a stage's inputs."""
JUDGE_INPUTS = "score.judge.model"
"""Name of the stages whose checkpoints judge among a stage's inputs."""
FUNCTION = "function"
"""Name of the function if ``score`` is a text, in logs of stages that also have a reward model."""
LoadReward = Callable[[Artifact], Scorer]


@dataclass
class LateScorer:
    """A reward model that is loaded when it scores for the first time: until then an engine needs the memory."""

    load: Callable[[], Scorer]
    _scorer: Scorer | None = field(default=None, init=False)

    def open(self) -> Scorer:
        """Return the reward model's scorer, which is loaded now if it was not."""
        if self._scorer is None:
            self._scorer = self.load()
        return self._scorer

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Return one score per response."""
        return self.open().score(rows, responses, truncated)

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
        return (_counting(context, Part(FUNCTION, 1.0, function_scorer(score, label=score.rpartition(":")[2]))),)
    artifacts = iter(context.inputs.get(REWARD_INPUTS) or ())
    checkpoints = iter(context.inputs.get(JUDGE_INPUTS) or ())

    def open_judge(entry: RewardEntry, place: str) -> JudgeScorer:
        assert entry.judge is not None
        checkpoint = None if entry.judge.model is None else next(checkpoints)
        return _open_judge(context, entry, place, checkpoint, processes)

    parts = open_entries(score, RewardSources(lambda _: load_reward(next(artifacts)), open_judge))
    return tuple(_counting(context, part) for part in parts)


def _counting(context: StageContext, part: Part) -> Part:
    """Return a part that reports counts while it scores. A function that gets a whole batch has none."""

    def report(done: int, total: int, tokens: int = 0) -> None:
        context.phase(f"scoring {done}/{total} by '{part.name}'")

    scorer = part.scorer
    if isinstance(scorer, JudgeScorer) and isinstance(scorer.judge, CachedJudge):
        scorer.judge.client.on_progress = report
    if isinstance(scorer, FunctionScorer | VerifierScorer):
        return replace(part, scorer=replace(scorer, report=report))
    return part


@dataclass(frozen=True)
class RewardSources:
    """Sources of what a list of rewards needs in addition to its entries."""

    load_reward: Callable[[RewardEntry], Scorer]
    """Returns the scorer of an entry ``reward``; called in the order of the list."""
    open_judge: Callable[[RewardEntry, str], JudgeScorer]
    """Returns the scorer of an entry with a judge, given its place in messages; called in the order of the list."""


def open_entries(entries: Sequence[RewardEntry], sources: RewardSources) -> tuple[Part, ...]:
    """Return the parts of a list of rewards; raises as ``open_rewards`` does."""
    parts = []
    for index, entry in enumerate(entries):
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
                steps=entry.steps,
                timeout=entry.timeout,
            )
        elif entry.judge is not None:
            scorer = sources.open_judge(entry, place)
        elif entry.verifier is not None:
            scorer = open_verifier(entry, place)
        else:
            scorer = sources.load_reward(entry)
        parts.append(Part(entry.label, entry.weight, scorer))
    # Last, so a misspelled function costs no request.
    for part in parts:
        if isinstance(part.scorer, JudgeScorer):
            part.scorer.check()
    return tuple(parts)


def _open_judge(
    context: StageContext, entry: RewardEntry, place: str, checkpoint: Artifact | None, processes: int
) -> JudgeScorer:
    """Return the scorer of an entry with a judge, which is a server if there is no ``checkpoint``."""
    assert entry.judge is not None
    # A stage cache for each judge, so each counts what it costs.
    caches = JudgmentCaches(context.checkpoints / f"score-{entry.label}", context.cache, context.warn)
    if checkpoint is None:
        judge = stage_judge(entry.judge, caches, place, processes)
    else:
        backend = CheckpointJudge(checkpoint, context.runtime, context.precision, place, context.fail_at_once)
        judge = checkpoint_judge(entry.judge, backend, checkpoint.stage, caches, processes)
    return _judge_scorer(entry, judge, place)


def open_server_judge(entry: RewardEntry, caches: JudgmentCaches, place: str) -> JudgeScorer:
    """Return the scorer of an entry whose judge is a server. Raises ``UserError`` if its key is not set."""
    assert entry.judge is not None
    return _judge_scorer(entry, stage_judge(entry.judge, caches, place, 1), place)


def _judge_scorer(entry: RewardEntry, judge: Judge, place: str) -> JudgeScorer:
    """Return the scorer that grades, or that asks about the entry's criteria."""
    assert entry.judge is not None
    if entry.criteria is None:
        return GradeScorer(entry.judge, judge, place)
    return criteria_by(judge, entry, place)


def open_metric(context: StageContext, settings: MetricFunction, place: str) -> CriteriaScorer | VerifierScorer:
    """Return the scorer of a metric of ``evaluate`` that is a verifier; raises as ``open_rewards`` does."""
    if settings.criteria is None:
        return open_verifier(settings, place)
    caches = JudgmentCaches(context.checkpoints / f"metric-{settings.metric}", context.cache, context.warn)
    scorer = criteria_scorer(settings, caches, place)
    scorer.check()
    return scorer


def score_facts(parts: tuple[Part, ...]) -> dict[str, Any]:
    """Return ``judges``: requests, tokens and cost of each judge by name; and ``sandboxes``: the level of each."""
    usage = {part.name: part.scorer.usage() for part in parts if isinstance(part.scorer, JudgeScorer)}
    scorers = [(part.name, part.scorer) for part in parts if isinstance(part.scorer, VerifierScorer)]
    levels = {name: scorer.sandbox.level for name, scorer in scorers if scorer.sandbox is not None}
    return {**({"judges": usage} if usage else {}), **({"sandboxes": levels} if levels else {})}


def close_rewards(parts: tuple[Part, ...]) -> None:
    """Free the reward models and judges that were loaded late."""
    for part in parts:
        if isinstance(part.scorer, LateScorer | JudgeScorer):
            part.scorer.close()


def load_late(context: StageContext) -> LoadReward:
    """Return a function that loads a reward stage's checkpoint when it scores for the first time."""

    def load(artifact: Artifact) -> Scorer:
        def report(done: int, total: int) -> None:
            context.phase(f"scoring {done}/{total} by '{artifact.stage}'")

        return LateScorer(lambda: load_checkpoint(artifact.model, context.runtime, context.precision, report))

    return load


def load_checkpoint(
    folder: Path, runtime: Runtime, setting: PrecisionSetting, report: Callable[[int, int], None] | None = None
) -> Scorer:
    """Return the scorer of a reward model's checkpoint; ``report`` gets counts while it scores."""
    from align.models.compute.precision import resolve_precision
    from align.models.compute.processes import device_of, use_threads
    from align.models.reward import RewardModel

    use_threads(runtime)
    device = device_of(runtime)
    model = RewardModel(folder, device, resolve_precision(setting, device))
    model.on_progress = report
    return RewardScorer(model)
