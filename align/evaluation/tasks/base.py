"""The interface of a task: its items, and the phases in which it measures every system. Torch-free.

An evaluation has phases, so a machine holds one model at a time. First every system answers every task
(``respond``, with a rollout engine), and plays the episodes of tasks with an environment (``play``, with the same
engine). Then every system reads texts (``read``, its own forward pass). Then answers are scored (``score``: programs,
reward models, judges). A task implements the phases it needs. Statistics are computed elsewhere, from the numbers per
item that it returns.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from align.evaluation.answers import Answers, Episodes, Example, Item, Measured
from align.evaluation.scorecard import Metric, SystemInfo
from align.store.artifacts import Artifact

if TYPE_CHECKING:
    # A plan imports this module, and needs neither engines nor models.
    from align.evaluation.participants import Performer, Reader, Respondent
    from align.evaluation.scoring import ScoringContext


@dataclass(frozen=True)
class TaskInputs:
    """Everything in addition to its settings that a task is built from."""

    seed: int
    base: Path
    """Folder that relative paths start from."""
    pairs: list[dict[str, Any]]
    """Rows of the stage's ``pairs``, test split; empty without."""
    has_second_reward: bool
    precision: Literal["bfloat16", "float32"]
    warn: Callable[[str], None]
    note: Callable[[str], None]
    """Shows a line to the user that is not a warning."""
    texts: Mapping[str, Artifact] = field(default_factory=dict)
    """The stage's ``texts``, by the name of the stage that made them."""
    rows: Mapping[str, Artifact] = field(default_factory=dict)
    """The stage's ``rows``, likewise."""
    users: Mapping[str, Artifact] = field(default_factory=dict)
    """The stage's ``users``, likewise."""


class Task(ABC):
    """One task. Subclasses set the attributes below and override the phases that they need."""

    responds: ClassVar[bool] = False
    reads: ClassVar[bool] = False
    loads_checkpoint: ClassVar[bool] = False
    """True if reading loads the checkpoint again, in another process: such a task reads when no model is loaded."""
    plays: ClassVar[bool] = False
    """True if systems play episodes; best-of-N systems do not."""
    episode_count: int = 0
    """Episodes that each system plays."""
    renders: bool = False
    """True if a conversation is read, with the system's own prompt and examples before it."""

    name: str
    """Name in the YAML, the part before the dot in ``ifeval.prompt_strict``."""
    kind: str
    title: str
    items: list[Item]
    metrics: dict[str, Metric]
    """In the order shown."""
    primary: str
    """The task's headline, among ``metrics``."""

    def examples(self, count: int) -> list[Example]:
        """Return at most ``count`` solved questions that are not among the items; empty if the task has none."""
        return []

    def check(self, info: SystemInfo) -> None:  # noqa: B027  (most tasks suit any system)
        """Raise ``UserError`` for a system that does not fit the task, such as more shots than examples.

        The plan calls it for every system before anything expensive.
        """

    def check_systems(self, systems: Sequence[SystemInfo]) -> None:  # noqa: B027
        """Raise ``UserError`` if the task needs a system that is not there, such as the base to compare with.

        The plan calls it once for all systems, before anything expensive.
        """

    def check_reading(self, info: SystemInfo, tokenizer: Any, max_length: int) -> None:  # noqa: B027
        """Raise ``UserError`` for a system that cannot read the task; for tasks with ``reads``.

        ``max_length`` is the number of tokens that its model can read at once.
        """

    def check_checkpoint(self, tokenizer: Any, max_length: int, where: str) -> None:  # noqa: B027
        """Raise ``UserError`` for a checkpoint that cannot play the task's episodes; for tasks with ``plays``.

        ``max_length`` is the number of tokens that the engine holds, ``where`` names the checkpoint.
        """

    def settings(self) -> dict[str, Any]:
        """Return everything needed to reproduce the numbers: data, template, sampling, rubric, seed. JSON-able."""
        return {}

    def respond(self, respondent: Respondent) -> Answers:
        """Have one system answer; for tasks with ``responds``."""
        raise NotImplementedError

    def play(self, performer: Performer) -> Episodes:
        """Have one system play; for tasks with ``plays``."""
        raise NotImplementedError

    def read(self, reader: Reader) -> Measured:
        """Have one system read; for tasks with ``reads``."""
        raise NotImplementedError

    def score(self, answers: Mapping[str, Answers], context: ScoringContext) -> dict[str, Measured]:
        """Return the numbers of every system that answered, by name; without ``responds``, ``answers`` is empty."""
        return {}

    def score_episodes(self, episodes: Mapping[str, Episodes], context: ScoringContext) -> dict[str, Measured]:
        """Return the numbers of every system that played, by name; for tasks with ``plays``."""
        raise NotImplementedError

    def item_values(self) -> dict[str, list[dict[str, list[float | None]]]]:
        """Return numbers of items that belong to no compared system: a reward model's stage → item → name → numbers."""
        return {}

    def item_answers(self) -> list[dict[str, list[dict[str, Any]]]]:
        """Return scored answers that came with the items: per item, side → answers, as ``samples.jsonl`` has them."""
        return []

    def judgments(self) -> list[dict[str, Any]]:
        """Return the replies of the task's judge, after scoring, as lines of ``judgments.jsonl``."""
        return []

    def extras(self) -> dict[str, Any]:
        """Return results that are no metric of a system, after scoring: ``win_rates``, ``reward_models``.

        JSON-able; see ``scorecard_builder.py``.
        """
        return {}
