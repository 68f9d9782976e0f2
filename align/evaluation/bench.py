"""What tasks are given in each phase: a system that answers, one that reads, and the reward models that score.

Implements the Protocols of ``tasks/base.py``. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
from align.data.rows import Message
from align.errors import UserError
from align.evaluation.generation import Sampler
from align.evaluation.measure import LoadedModels, Results
from align.evaluation.systems import System
from align.evaluation.tasks.base import Answers, Example
from align.inference.protocol import Response, Sampling
from align.models.precision import Precision
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact
from align.store.fingerprint import digest

NOTHING = Response([], [], False, "")
"""The answer to a conversation that has grown longer than the engine reads."""


class SystemRespondent:
    """One system, answering through the evaluation's engine."""

    def __init__(self, system: System, sampler: Sampler, longest: int, warn: Callable[[str], None]) -> None:
        """``longest`` is the prompt and response together, in tokens, that the engine can hold."""
        self.system, self.sampler, self.longest, self.warn = system, sampler, longest, warn
        self.info = system.info

    def answer(
        self,
        prompts: Sequence[list[Message]],
        sampling: Sampling,
        examples: Sequence[Example] = (),
        *,
        going_on: bool = False,
    ) -> list[list[Response]]:
        """See the protocol. A conversation that leaves no room for the answer gets an empty, unfinished one."""
        asked = self.system.sampling(sampling)
        if going_on:
            asked = replace(asked, n=sampling.n)
        rendered = [self.system.render(prompt, examples) for prompt in prompts]
        fits = [index for index, ids in enumerate(rendered) if len(ids) + sampling.max_tokens <= self.longest]
        if len(fits) < len(rendered):
            self.warn(
                f"{self.info.name}: {len(rendered) - len(fits)} conversations and max_tokens {sampling.max_tokens} are "
                f"longer than {self.longest} tokens; they count as not answered. Raise max_context"
            )
        found = self.sampler.generate(self.system.policy, [rendered[index] for index in fits], asked).responses
        answers = [[NOTHING] * asked.n for _ in prompts]
        for index, samples in zip(fits, found, strict=True):
            answers[index] = samples
        return answers


class SystemReader:
    """One system's own forward pass."""

    def __init__(self, system: System, models: LoadedModels, results: Results, runtime: Runtime) -> None:
        self.system, self.results, self.runtime = system, results, runtime
        self.info = system.info
        self.tokenizer = system.policy.tokenizer
        self.model_dir: Path = system.policy.model_dir
        self._logprobs = models.logprobs_of(system.policy.name, 1.0)
        self._precision = models.precision
        self.max_length = positions(self.model_dir, self.tokenizer)

    def render(self, prompt: list[Message], examples: Sequence[Example] = ()) -> list[int]:
        """See the protocol."""
        return self.system.render(prompt, examples)

    def logprobs(self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol."""
        return self._logprobs([list(ids) for ids in contexts], [list(ids) for ids in continuations])

    def kept(self, name: str, identity: Any, compute: Callable[[], Any]) -> Any:
        """See the protocol."""
        whole = digest([self.info.key, self._precision, identity])
        return self.results.read_or_compute(f"{name}-{self.info.name}", whole, compute)


def positions(model_dir: Path, tokenizer: Any) -> int:
    """Tokens that a model can read at once."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    known = config.get("max_position_embeddings") or config.get("n_positions")
    limits = [value for value in (known, tokenizer.model_max_length) if isinstance(value, int) and value > 0]
    return min(limits) if limits else 2048


class StageBench:
    """What scoring may use in a stage."""

    def __init__(
        self, context: StageContext, results: Results, reference: str, base: str | None, precision: Precision
    ) -> None:
        self.context, self.precision = context, precision
        self.seed, self.reference, self.base = context.seed, reference, base
        self.folder = context.checkpoints
        self.shared: Path | None = results.folder
        self.results = results
        self._models: dict[str, Any] = {}

    def artifact(self, which: str) -> Artifact | None:
        """The artifact of a reward model, where the stage was given one."""
        found = self.context.inputs.get(which)
        return found if isinstance(found, Artifact) else None

    def reward_stage(self, which: str = "reward") -> str | None:
        """See the protocol."""
        artifact = self.artifact(which)
        return None if artifact is None else artifact.stage

    def model(self, which: str) -> Any:
        """A loaded reward model; one is held at a time. Raises ``UserError`` where the stage was given none."""
        if which not in self._models:
            from align.models.reward import RewardModel
            from align.models.threads import device_of

            artifact = self.artifact(which)
            if artifact is None:
                raise UserError(f"{which}: no reward model was given; name a reward stage as `{which}`.")
            self._models.clear()
            self._models[which] = RewardModel(artifact.model, device_of(self.context.runtime), self.precision)
        return self._models[which]

    def close(self) -> None:
        """Free what is loaded."""
        self._models.clear()

    def reward_scores(
        self, prompts: Sequence[list[Message]], answers: Sequence[str], finished: Sequence[bool], which: str = "reward"
    ) -> list[float]:
        """See the protocol; scores are kept, under everything they depend on."""
        artifact = self.artifact(which)
        if artifact is None:
            raise UserError(f"{which}: no reward model was given; name a reward stage as `{which}`.")
        asked = [list(prompts), list(answers), [bool(one) for one in finished]]
        identity = digest(["scores", artifact.weights, self.precision, asked])
        found: list[float] = self.results.read_or_compute("scores", identity, lambda: self.model(which).score(*asked))
        return found

    def warn(self, message: str) -> None:
        """See the protocol."""
        self.context.warn(message)

    def progress(self, done: float, total: float, unit: str) -> None:
        """See the protocol."""
        self.context.progress(done, total, unit=unit)


def keep_best(answers: Answers, best_of: int, bench: StageBench) -> Answers:
    """Of every ``best_of`` samples the one whose last answer the reward model scores highest, the first of equal ones.

    A conversation of several turns is scored at its last one, which shows the model all of them.
    """
    last = [sample[-1] for samples in answers for sample in samples]
    scores = bench.reward_scores(
        [turn.prompt for turn in last], [turn.response.text for turn in last], [turn.response.finished for turn in last]
    )
    kept_answers: Answers = []
    at = 0
    for samples in answers:
        own = scores[at : at + len(samples)]
        at += len(samples)
        groups = range(0, len(samples), best_of)
        kept_answers.append([samples[max(range(g, g + best_of), key=lambda i: (own[i], -i))] for g in groups])
    return kept_answers
