"""Items of tasks, systems' answers and episodes, and the numbers that tasks measure on them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.data.rows import Message, Row
from align.environments.episode import Episode
from align.inference.protocol import Response

if TYPE_CHECKING:
    # A plan imports this module, and needs no environments.
    from align.config.environment import EnvironmentConfig
    from align.environments.environment import EnvironmentSource

Values = list[list[float]]
"""Per item, one number for each sample; a task without samples has one."""
RewardField = Literal["reward", "second_reward"]
"""The stage's input fields that name a reward model."""


@dataclass(frozen=True)
class Item:
    """One question of a task, as the scorecard and the samples name it."""

    id: str
    source: str
    """Category, for the table by source: the same name throughout if a task has none."""
    prompt: list[Message]
    """The question, for the reader of samples."""
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Further data that the task needs to score it."""


@dataclass(frozen=True)
class Turn:
    """A system's answer and the conversation before it, without the system's own prompt or examples."""

    prompt: list[Message]
    response: Response


Answers = list[list[list[Turn]]]
"""One system's answers: per item, per sample, its turns in order; most tasks have one turn."""
Episodes = list[list[Episode]]
"""One system's episodes: per item, per sample."""


@dataclass(frozen=True)
class EpisodeSet:
    """The episodes that a task wants of every system: ``samples`` of each row."""

    task: str
    environment: EnvironmentConfig
    source: EnvironmentSource
    """The environment, opened."""
    identity: str
    """Everything that episodes depend on in the environment: its code and settings, and the weights of its user."""
    rows: list[Row]
    ids: list[str]
    """Name of each row: an episode's seed depends on it, and not on the other rows."""
    samples: int
    temperature: float
    seed: int
    user_dir: Path | None = None
    """Folder of the checkpoint that plays the user, if one does."""


@dataclass
class Measured:
    """One system's numbers in a task. Every metric has as many entries as the task has items, in their order."""

    values: dict[str, Values]
    """Metric → values, without the task's name: ``prompt_strict``."""
    weights: dict[str, list[float]] = field(default_factory=dict)
    """Weight of each item, for metrics that are a ratio of sums (loss per token, share of instructions); a value is per
    unit of weight. An item of weight 0 has no such number (a safe prompt of XSTest, for the refusal rate of unsafe
    ones): its value is a meaningless 0, and statistics leave the item out, also of their n."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Counts to show next to the numbers: unreadable verdicts, answers cut off."""
    estimates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metric → its estimate, if the task computes it; else the scorecard computes it from the values."""


@dataclass(frozen=True)
class Example:
    """A question with its answer, for few-shot prompts."""

    question: str
    answer: str


@dataclass
class ResponseSet:
    """One system's responses to a list of prompts, and the engine that sampled them."""

    engine: str
    responses: list[list[Response]]
    """Per prompt, its samples."""

    def flatten(self, rows: Sequence[Any]) -> tuple[list[Response], list[Any]]:
        """Return all responses in one list, and for each response the entry of ``rows`` of its prompt."""
        responses = [response for samples in self.responses for response in samples]
        repeated = [row for row, samples in zip(rows, self.responses, strict=True) for _ in samples]
        return responses, repeated

    def unflatten(self, numbers: Sequence[float]) -> Values:
        """Return one number for each response as a list per prompt."""
        remaining = iter(numbers)
        return [[float(next(remaining)) for _ in samples] for samples in self.responses]


@dataclass
class SystemResponses:
    """All systems' responses: to the prompt set, and to each task."""

    prompt_set: dict[str, ResponseSet] = field(default_factory=dict)
    """System → its responses to the prompt set."""
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    """Task → system → its answers."""
    episodes: dict[str, dict[str, Episodes]] = field(default_factory=dict)
    """Task → system → its episodes, for tasks with an environment."""
    engines: list[str] = field(default_factory=list)
    tokens: int = 0
