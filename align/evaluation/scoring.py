"""Scores of answers by programs and reward models, cached on disk under a key of their inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.base import Precision
from align.config.runtime.rollouts import READ_TOKENS
from align.data.rows import Message
from align.errors import UserError
from align.evaluation.answers import Answers, ResponseSet, RewardField, Values
from align.evaluation.scorecard import ProgramDescription
from align.inference.protocol import Response
from align.pipeline.context import StageContext
from align.scoring.scored import Scored, Scorer
from align.store.artifacts import Artifact
from align.store.fingerprint import digest
from align.store.json_files import read_entry, read_or_compute, write_entry

Row = dict[str, Any]
SUM = "score"
"""Metric of the weighted sum of a list ``score:``."""
REWARD = f"{SUM}_"
"""Prefix of the metrics of the list's rewards, and of what they return in addition to their score."""


@dataclass(frozen=True)
class ResultCache:
    """Measurements on disk, which runs share: each under a name and the digest of its inputs."""

    folder: Path
    warn: Callable[[str], object]

    def read_or_compute(self, name: str, key: str, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``'s JSON-able result, or an earlier attempt's or run's result under the same key.

        A damaged result is computed again, with a warning.
        """
        return read_or_compute(self._path(name, key), key, compute, self.warn)

    def read(self, name: str, key: str) -> Any:
        """Return the result of an earlier attempt or run; None if there is none."""
        values = read_entry(self._path(name, key), key, self.warn)
        return values[0] if values is not None and len(values) == 1 else None

    def write(self, name: str, key: str, result: Any) -> Any:
        """Store a JSON-able result, and return it as JSON reads it back."""
        stored = json.loads(json.dumps(result))
        write_entry(self._path(name, key), key, [stored])
        return stored

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key[:16]}.jsonl"


def shape_values(response_set: ResponseSet) -> dict[str, Values]:
    """Return ``length`` of answers in tokens, and ``finished``: 1 for a response that ended by itself, else 0."""
    return {
        "length": [[float(response.answer_tokens) for response in samples] for samples in response_set.responses],
        "finished": [[float(response.finished) for response in samples] for samples in response_set.responses],
    }


def has_thoughts(response_set: ResponseSet) -> bool:
    """Return True if a response has a thought."""
    return any(response.thought_tokens for samples in response_set.responses for response in samples)


def thought_values(response_set: ResponseSet) -> dict[str, Values]:
    """Return ``thought_length`` in tokens, and ``open_thoughts``: 1 for a response that ends inside its thought."""
    return {
        "thought_length": [
            [float(response.thought_tokens) for response in samples] for samples in response_set.responses
        ],
        "open_thoughts": [[float(response.is_open) for response in samples] for samples in response_set.responses],
    }


def score_responses(scorer: Scorer, rows: Sequence[Row], response_set: ResponseSet) -> Scored:
    """Return the scores of all responses to the rows, prompt by prompt."""
    responses, repeated = response_set.flatten(rows)
    texts: list[str] = [response.answer_text for response in responses]
    return scorer.score(repeated, texts, [not response.finished for response in responses])


def metric_values(scored: Scored, metric: str, response_set: ResponseSet) -> dict[str, Values]:
    """Return the scores as ``metric``, and those of rewards and their further metrics as ``metric_<name>``.

    Further metrics that some response lacks are omitted.
    """
    # Scores always count, and a model's NaN shows; only of a further metric it means that the response lacks it.
    columns = {
        f"{metric}_{name}": values
        for name, values in scored.columns().items()
        if name in scored.parts or all(map(math.isfinite, values))
    }
    return {name: response_set.unflatten(values) for name, values in {metric: scored.total, **columns}.items()}


def reward_values(
    score: Callable[..., list[float]], rows: Sequence[Row], response_sets: Sequence[ResponseSet]
) -> list[Values]:
    """Return reward-model scores of each set of responses to ``rows``, per prompt and sample.

    ``score(prompts, responses, finished, tools)`` is called once, so a model reads each prompt once for all sets.
    """
    responses: list[Response] = []
    repeated: list[Row] = []
    for response_set in response_sets:
        set_responses, set_rows = response_set.flatten(rows)
        responses += set_responses
        repeated += set_rows
    scores = score(
        [row["prompt"] for row in repeated],
        [response.answer_text for response in responses],
        [response.finished for response in responses],
        [row.get("tools") for row in repeated],
    )
    # Divide the scores in the order in which the responses were joined.
    remaining = iter(scores)
    return [
        [[float(next(remaining)) for _ in samples] for samples in response_set.responses]
        for response_set in response_sets
    ]


def describe_rewards(weights: Mapping[str, float], columns: Collection[str]) -> dict[str, ProgramDescription]:
    """Return direction and meaning of a list's metrics, by name; the direction is None for further metrics."""
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
    described: dict[str, ProgramDescription] = {SUM: ("higher", f"weighted sum: {terms}")}
    for metric in columns:
        if not metric.startswith(REWARD):
            continue
        name = metric.removeprefix(REWARD)
        if name in weights:
            better = "higher" if weights[name] >= 0 else "lower"
            described[metric] = (better, f"reward '{name}', of weight {weights[name]:g} in the score")
        else:
            described[metric] = (None, "metric that a reward returned")
    return described


class ScoringContext:
    """Models, folders and messages for the scoring phase of a stage. A model is loaded at its first use."""

    def __init__(
        self, context: StageContext, results: ResultCache, reference: str, base: str | None, precision: Precision
    ) -> None:
        self.context = context
        self.precision = precision
        self.seed = context.seed
        self.reference = reference
        """The system that the others are compared with."""
        self.base = base
        self.folder = context.checkpoints
        """Folder that survives attempts of the stage, for expensive results such as judgments."""
        self.shared: Path | None = results.folder
        """Folder that runs share."""
        self.results = results
        self._models: dict[str, Any] = {}
        self._scored: dict[RewardField, dict[str, float]] = {}
        """Scores so far, by the digest of prompt, answer, whether it is finished, and tools."""

    def artifact(self, field: RewardField) -> Artifact | None:
        """Return the artifact of a reward model; None if the stage has none."""
        artifact = self.context.inputs.get(field)
        return artifact if isinstance(artifact, Artifact) else None

    def reward_stage(self, field: RewardField = "reward") -> str | None:
        """Return the stage of a reward model; None if the evaluation has none."""
        artifact = self.artifact(field)
        return None if artifact is None else artifact.stage

    def model(self, field: RewardField) -> Any:
        """Load a reward model; a stage holds one model at a time. Raises ``UserError`` if the stage has none.

        Under bfloat16 its weights are rounded once. What several conversations begin with is read once.
        """
        if field not in self._models:
            from align.models.compute.processes import device_of
            from align.models.reward import RewardModel

            artifact = self._required_artifact(field)
            # Before the next one is loaded, since memory holds one.
            self._models.clear()
            model = RewardModel(
                artifact.model, device_of(self.context.runtime), self.precision, pass_tokens=READ_TOKENS
            )
            model.prepare_for_inference()
            model.on_progress = lambda done, total: self.progress(done, total, unit="answers scored")
            self._models[field] = model
        return self._models[field]

    def _required_artifact(self, field: RewardField) -> Artifact:
        artifact = self.artifact(field)
        if artifact is None:
            raise UserError(f"{field}: the stage has no such reward model; name a reward stage as `{field}`.")
        return artifact

    def close(self) -> None:
        """Free the loaded model."""
        self._models.clear()

    def reward_scores(
        self,
        prompts: Sequence[list[Message]],
        answers: Sequence[str],
        endings: Sequence[bool],
        field: RewardField = "reward",
        *,
        tools: Sequence[str | None] | None = None,
    ) -> list[float]:
        """Return the scores of a reward model, cached under everything they depend on.

        ``tools`` has an entry per prompt. Raises ``UserError`` if the evaluation has no such model.
        """
        artifact = self._required_artifact(field)
        offered = [None] * len(prompts) if tools is None else list(tools)
        arguments: list[Any] = [list(prompts), list(answers), [bool(flag) for flag in endings]]
        # Most rows have no tools: without them an entry has the name that it always had.
        if any(tool is not None for tool in offered):
            arguments.append(offered)
        identity = digest(["scores 2", artifact.weights, self.precision, arguments])
        scores: list[float] = self.results.read_or_compute(
            "scores", identity, lambda: self.score(field, prompts, answers, endings, offered)
        )
        return scores

    def score(
        self,
        field: RewardField,
        prompts: Sequence[list[Message]],
        answers: Sequence[str],
        endings: Sequence[bool],
        tools: Sequence[str | None],
    ) -> list[float]:
        """Return a reward model's scores in one pass; it reads no answer that it read before in this stage."""
        requests = [
            (list(prompt), answer, bool(flag), offered)
            for prompt, answer, flag, offered in zip(prompts, answers, endings, tools, strict=True)
        ]
        # Scores vary in their last digits with the other rows of a batch. One score for equal answers makes them tie.
        keys = [digest(list(request)) for request in requests]
        scored = self._scored.setdefault(field, {})
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in scored}
        if missing:
            columns = [list(column) for column in zip(*missing.values(), strict=True)]
            scored |= zip(missing, self.model(field).score(*columns), strict=True)
        return [scored[key] for key in keys]

    def warn(self, message: str) -> None:
        """Show a warning to the user."""
        self.context.warn(message)

    def progress(self, completed: float, total: float, unit: str) -> None:
        """Report progress."""
        self.context.progress(completed, total, unit=unit)


def select_best(
    answers: Answers, best_of: int, context: ScoringContext, tools: Sequence[str | None] | None = None
) -> Answers:
    """Select of every ``best_of`` samples the sample with the highest reward, the first of equals.

    A conversation of several turns is scored at its last answer, after the model has read all turns. ``tools`` are
    the tools of each item.
    """
    last = [sample[-1] for samples in answers for sample in samples]
    offered = None
    if tools is not None:
        offered = [tool for tool, samples in zip(tools, answers, strict=True) for _ in samples]
    scores = context.reward_scores(
        [turn.prompt for turn in last],
        [str(turn.response.answer_text) for turn in last],
        [turn.response.finished for turn in last],
        tools=offered,
    )
    selected: Answers = []
    remaining = iter(scores)
    for samples in answers:
        item_scores = [next(remaining) for _ in samples]
        # Samples come in groups of ``best_of``, each of which stands for one sample of another system.
        groups = [range(start, start + best_of) for start in range(0, len(samples), best_of)]
        selected.append([samples[_best_index(item_scores, group)] for group in groups])
    return selected


def _best_index(scores: Sequence[float], group: range) -> int:
    # A score that is no number is below all others: compared as it is, the first sample would win.
    # Of equal scores the first: ``-index`` is larger for an earlier sample.
    return max(group, key=lambda index: (-math.inf if math.isnan(scores[index]) else scores[index], -index))
