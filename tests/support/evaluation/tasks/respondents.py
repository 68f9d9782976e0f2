"""Stand-ins for the phases of an evaluation: a scripted system, a scoring context without models, task inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.stages.evaluation.tasks import Gsm8kConfig
from align.data.rows import Message
from align.evaluation.answers import Answers, Example, Turn
from align.evaluation.scorecard import SystemInfo
from align.evaluation.tasks import build_task
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.sampled import Gsm8kTask
from align.inference.protocol import Response, Sampling


def task_inputs(base: Path, seed: int = 0) -> TaskInputs:
    """Return the inputs of a task without a stage."""
    return TaskInputs(
        seed=seed,
        base=base,
        pairs=[],
        has_second_reward=False,
        precision="float32",
        warn=lambda message: None,
        note=lambda message: None,
    )


def make_gsm8k_task(folder: Path, seed: int = 0, **settings: Any) -> Gsm8kTask:
    """Build GSM8K's task on files in ``folder``."""
    task = build_task("gsm8k", Gsm8kConfig(**settings), task_inputs(folder, seed))
    assert isinstance(task, Gsm8kTask)
    return task


def response(text: str, finished: bool = True) -> Response:
    """A response whose tokens do not matter."""
    return Response(token_ids=[1], logprobs=[0.0], finished=finished, text=text)


def answered(task: Task, texts: Sequence[str | Sequence[str]], finished: bool = True) -> Answers:
    """Answers as a respondent returns them, one text (or one for each sample) an item."""
    samples = [[entry] if isinstance(entry, str) else list(entry) for entry in texts]
    return [
        [[Turn(list(item.prompt), response(text, finished))] for text in several]
        for item, several in zip(task.items, samples, strict=True)
    ]


@dataclass
class Scripted:
    """A respondent that keeps what it was asked."""

    reply: Callable[[list[Message]], str]
    shots: int = 0
    prompts: list[list[Message]] = field(default_factory=list)
    sampling: Sampling | None = None
    examples: list[Example] = field(default_factory=list)

    @property
    def info(self) -> SystemInfo:
        return SystemInfo("scripted", "scripted", "prompted" if self.shots else "checkpoint", "key", shots=self.shots)

    def answer(
        self,
        prompts: Sequence[list[Message]],
        sampling: Sampling,
        examples: Sequence[Example] = (),
        *,
        is_continuation: bool = False,
    ) -> list[list[Response]]:
        self.prompts, self.sampling, self.examples = [list(entry) for entry in prompts], sampling, list(examples)
        return [[response(self.reply(prompt)) for _ in range(sampling.n)] for prompt in prompts]


@dataclass
class NoModelContext:
    """A bench without a reward model."""

    seed: int = 0
    reference: str = "sft"
    base: str | None = None
    folder: Path = Path()
    shared: Path | None = None
    warnings: list[str] = field(default_factory=list)

    def reward_scores(
        self, prompts: Sequence[list[Message]], answers: Sequence[str], finished: Sequence[bool], field: str = "reward"
    ) -> list[float]:
        raise AssertionError("these tasks ask no reward model")

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def progress(self, done: float, total: float, unit: str) -> None:
        assert 0 < done <= total
