"""Implementations of the phases' protocols (``tasks/base.py``): respondent, reader and scoring context.

Nothing is loaded before its first use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config.base import Precision
from align.config.batch_sizes import READ_TOKENS
from align.config.runtime import Runtime
from align.data.rows import Message
from align.errors import UserError
from align.evaluation.generation import Sampler
from align.evaluation.measure import LoadedModels, ResultCache
from align.evaluation.systems import System
from align.evaluation.tasks.base import Answers, Example, RewardField
from align.inference.protocol import Response, Sampling
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact
from align.store.fingerprint import digest

NO_ANSWER = Response([], [], False, "")
"""The answer to a conversation that is longer than the engine can hold."""


class SystemRespondent:
    """One system, answering through the evaluation's engine."""

    def __init__(self, system: System, sampler: Sampler, max_length: int, warn: Callable[[str], None]) -> None:
        """``max_length`` is the length of prompt and response together, in tokens, that the engine can hold."""
        self.system = system
        self.sampler = sampler
        self.max_length = max_length
        self.warn = warn
        self.info = system.info

    def answer(
        self,
        prompts: Sequence[list[Message]],
        sampling: Sampling,
        examples: Sequence[Example] = (),
        *,
        is_continuation: bool = False,
    ) -> list[list[Response]]:
        """See the protocol. A conversation that leaves no room for the answer gets an empty, unfinished one."""
        system_sampling = self.system.sampling(sampling)
        if is_continuation:
            # Later turns continue one sample each, so best of N does not multiply them again.
            system_sampling = replace(system_sampling, n=sampling.n)
        rendered = [self.system.render(prompt, examples) for prompt in prompts]
        fitting = [index for index, ids in enumerate(rendered) if len(ids) + sampling.max_tokens <= self.max_length]
        if len(fitting) < len(rendered):
            self.warn(
                f"{self.info.name}: {len(rendered) - len(fitting)} conversations and max_tokens {sampling.max_tokens} "
                f"are longer than {self.max_length} tokens; they count as not answered. Raise max_context"
            )
        ids = [rendered[index] for index in fitting]
        responses = self.sampler.generate(self.system.policy, ids, system_sampling).responses
        # Every conversation gets an answer, so that systems stay aligned item by item.
        answers = [[NO_ANSWER] * system_sampling.n for _ in prompts]
        for index, samples in zip(fitting, responses, strict=True):
            answers[index] = samples
        return answers


class SystemReader:
    """One system's own forward pass."""

    def __init__(self, system: System, models: LoadedModels, results: ResultCache, runtime: Runtime) -> None:
        self.system = system
        self.results = results
        self.runtime = runtime
        self.info = system.info
        self.tokenizer = system.policy.tokenizer
        self.model_dir: Path = system.policy.model_dir
        self._logprobs = models.logprobs_of(system.policy.name, 1.0)
        self._precision = models.precision
        self.max_length = max_input_tokens(self.model_dir, self.tokenizer)

    def render(self, prompt: list[Message], examples: Sequence[Example] = ()) -> list[int]:
        """See the protocol."""
        return self.system.render(prompt, examples)

    def logprobs(self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol."""
        return self._logprobs([list(ids) for ids in contexts], [list(ids) for ids in continuations])

    def cached(self, name: str, identity: Any, compute: Callable[[], Any]) -> Any:
        """See the protocol."""
        # The number is raised when the forward pass changes.
        key = digest(["read 2", self.info.key, self._precision, identity])
        return self.results.read_or_compute(f"{name}-{self.info.name}", key, compute)


def max_input_tokens(model_dir: Path, tokenizer: Any) -> int:
    """Return the number of tokens that a model can read at once; 2048 where neither file limits it."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    limits = [value for value in (positions, tokenizer.model_max_length) if isinstance(value, int) and value > 0]
    return min(limits) if limits else 2048


class StageScoringContext:
    """Models, caches and messages for the scoring phase of a stage."""

    def __init__(
        self, context: StageContext, results: ResultCache, reference: str, base: str | None, precision: Precision
    ) -> None:
        self.context = context
        self.precision = precision
        self.seed = context.seed
        self.reference = reference
        self.base = base
        self.folder = context.checkpoints
        self.shared: Path | None = results.folder
        self.results = results
        self._models: dict[str, Any] = {}
        self._scored: dict[RewardField, dict[str, float]] = {}
        """Scores so far, by the digest of prompt, answer, whether it is finished, and tools."""

    def artifact(self, field: RewardField) -> Artifact | None:
        """Return the artifact of a reward model; None where the stage has none."""
        artifact = self.context.inputs.get(field)
        return artifact if isinstance(artifact, Artifact) else None

    def reward_stage(self, field: RewardField = "reward") -> str | None:
        """See the protocol."""
        artifact = self.artifact(field)
        return None if artifact is None else artifact.stage

    def model(self, field: RewardField) -> Any:
        """Load a reward model; one is held at a time. Raises ``UserError`` where the stage has none.

        Under bfloat16 its weights are rounded once. What several conversations begin with is read once.
        """
        if field not in self._models:
            from align.models.reward import RewardModel
            from align.models.threads import device_of

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
        finished: Sequence[bool],
        field: RewardField = "reward",
        *,
        tools: Sequence[str | None] | None = None,
    ) -> list[float]:
        """See the protocol; scores are cached under everything they depend on. ``tools`` are those of each prompt."""
        artifact = self._required_artifact(field)
        offered = [None] * len(prompts) if tools is None else list(tools)
        arguments: list[Any] = [list(prompts), list(answers), [bool(flag) for flag in finished]]
        # Most rows have no tools: without them an entry has the name that it always had.
        if any(tool is not None for tool in offered):
            arguments.append(offered)
        identity = digest(["scores 2", artifact.weights, self.precision, arguments])
        scores: list[float] = self.results.read_or_compute(
            "scores", identity, lambda: self.score(field, prompts, answers, finished, offered)
        )
        return scores

    def score(
        self,
        field: RewardField,
        prompts: Sequence[list[Message]],
        answers: Sequence[str],
        finished: Sequence[bool],
        tools: Sequence[str | None],
    ) -> list[float]:
        """Return a reward model's scores in one pass; it reads no answer that it read before in this stage."""
        requests = [
            (list(prompt), answer, bool(flag), offered)
            for prompt, answer, flag, offered in zip(prompts, answers, finished, tools, strict=True)
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
        """See the protocol."""
        self.context.warn(message)

    def progress(self, done: float, total: float, unit: str) -> None:
        """See the protocol."""
        self.context.progress(done, total, unit=unit)


def select_best(
    answers: Answers, best_of: int, context: StageScoringContext, tools: Sequence[str | None] | None = None
) -> Answers:
    """Select of every ``best_of`` samples the one with the highest reward, the first of equal ones.

    A conversation of several turns is scored at its last answer, where the model reads all of them. ``tools`` are those
    of each item.
    """
    last = [sample[-1] for samples in answers for sample in samples]
    offered = None
    if tools is not None:
        offered = [tool for tool, samples in zip(tools, answers, strict=True) for _ in samples]
    scores = context.reward_scores(
        [turn.prompt for turn in last],
        [turn.response.text for turn in last],
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
