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
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from align.config.runtime import Runtime
from align.data.rows import Message, Row
from align.environments.episode import Episode
from align.evaluation.scorecard import Metric, SystemInfo
from align.evaluation.tasks.records import TaskRecord, describe_records, item_ids, load_records
from align.inference.protocol import Response, Sampling
from align.store.artifacts import Artifact

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


class Respondent(Protocol):
    """One system while the engine holds its weights."""

    info: SystemInfo

    def answer(
        self,
        prompts: Sequence[list[Message]],
        sampling: Sampling,
        examples: Sequence[Example] = (),
        *,
        is_continuation: bool = False,
    ) -> list[list[Response]]:
        """Return ``sampling.n`` responses to each conversation (times N for a best-of-N system), cached on disk.

        The system adds its own system message and examples here. ``examples`` are the task's, of which a few-shot
        system shows the first; it raises ``UserError`` if it needs more than there are.
        ``is_continuation`` marks later turns of conversations that a best-of-N system already has N times, so they
        are not multiplied by N again.
        """
        ...


class Performer(Protocol):
    """One system that acts in environments while the engine holds its weights. Best-of-N systems play no episodes."""

    def play(self, episode_set: EpisodeSet) -> Episodes:
        """Return the episodes of a task, kept on disk.

        The system adds its own system message and examples before the first message of each.
        """
        ...


class Reader(Protocol):
    """One system's own forward pass. Systems of role ``best_of`` never read: they have no distribution."""

    info: SystemInfo
    tokenizer: Any
    model_dir: Path
    """Folder of the checkpoint, for tasks that load it themselves."""
    runtime: Runtime
    """Device, threads, the engine's memory."""
    max_length: int
    """Tokens that the model can read at once (its positions, or its tokenizer's limit if that is lower)."""

    def render(self, prompt: list[Message], examples: Sequence[Example] = ()) -> list[int]:
        """Return the ids of a conversation up to the answer's start, the system's own prompt included."""
        ...

    def logprobs(self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token of a continuation, in nats, at temperature 1; no context may be empty."""
        ...

    def cached(self, name: str, identity: Any, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``'s JSON-able result, or an earlier run's for this system under the same ``identity``."""
        ...


class ScoringContext(Protocol):
    """Models, folders and messages for the scoring phase. Nothing is loaded before its first use."""

    seed: int
    reference: str
    """The system that the others are compared with."""
    base: str | None
    folder: Path
    """Folder that survives attempts of the stage, for expensive results such as judgments."""
    shared: Path | None
    """Folder that runs share, if there is one."""

    def reward_stage(self, field: RewardField = "reward") -> str | None:
        """Return the stage of a reward model; None if the evaluation has none."""
        ...

    def reward_scores(
        self,
        prompts: Sequence[list[Message]],
        answers: Sequence[str],
        endings: Sequence[bool],
        field: RewardField = "reward",
    ) -> list[float]:
        """Return the scores of a reward model. Raises ``UserError`` if the evaluation has none."""
        ...

    def warn(self, message: str) -> None:
        """Show a warning to the user."""
        ...

    def progress(self, completed: float, total: float, unit: str) -> None:
        """Report progress."""
        ...


@dataclass(frozen=True)
class TaskInputs:
    """Everything in addition to its settings that a task is built from."""

    seed: int
    base: Path
    """Folder that relative paths start from."""
    pairs: list[dict[str, Any]]
    """Rows of the stage's ``pairs``, test split; empty without."""
    heldout: list[dict[str, Any]]
    """Rows of the stage's ``heldout``, test split."""
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

        Called for every system before anything expensive.
        """

    def check_systems(self, systems: Sequence[SystemInfo]) -> None:  # noqa: B027
        """Raise ``UserError`` if the task needs a system that is not there, such as the base to compare with.

        Called once for all systems, before anything expensive.
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

    def extras(self) -> dict[str, Any]:
        """Return results that are no metric of a system, after scoring: ``win_rates``, ``reward_models``.

        JSON-able; see ``scorecard_builder.py``.
        """
        return {}


class SampledTask(Task):
    """A task whose items are answered in one turn each, with the sampling of its settings."""

    responds = True

    id_field: ClassVar[str | None] = None
    """Field of a record that names it; by default its file and line."""

    def __init__(self, name: str, config: Any, inputs: TaskInputs, records: list[TaskRecord] | None = None) -> None:
        """Build the items from ``records``, by default all that the settings name."""
        self.name = name
        self._config = config
        self._seed = inputs.seed
        self._sampling = Sampling(config.max_tokens, config.temperature, n=config.samples, seed=inputs.seed)
        self._data = self.describe_data(inputs.base)
        if records is None:
            records = load_records(config, inputs.base, inputs.seed)
        self.items = [
            self.make_item(id, record) for id, record in zip(item_ids(records, self.id_field), records, strict=True)
        ]

    def make_item(self, id: str, record: TaskRecord) -> Item:
        """Return the item of a record. Raises ``UserError`` for a record that does not fit the task."""
        raise NotImplementedError

    def describe_data(self, base: Path) -> dict[str, Any]:
        """Return what identifies the records. JSON-able."""
        return describe_records(self._config, base)

    def score(self, answers: Mapping[str, Answers], context: ScoringContext) -> dict[str, Measured]:
        """Return the numbers of every system, from its answers."""
        return {system: self.measure(system_answers) for system, system_answers in answers.items()}

    def measure(self, answers: Answers) -> Measured:
        """Return the numbers of one system."""
        raise NotImplementedError

    def prompts(self) -> list[list[Message]]:
        """Return the conversation that each item asks, by default its prompt."""
        return [list(item.prompt) for item in self.items]

    def respond(self, respondent: Respondent) -> Answers:
        """Have a system answer every item's conversation, one turn for each sample."""
        examples = self.examples(respondent.info.shots) if respondent.info.shots else []
        prompts = self.prompts()
        responses = respondent.answer(prompts, self._sampling, examples)
        return [
            [[Turn(prompt, response)] for response in samples]
            for prompt, samples in zip(prompts, responses, strict=True)
        ]


def answer_counts(answers: Answers) -> dict[str, int]:
    """Count the answers, those cut off at ``max_tokens``, and those that are blank."""
    return response_counts([turns[-1].response for samples in answers for turns in samples])


def response_counts(responses: Sequence[Response]) -> dict[str, int]:
    """Count the responses, those cut off at ``max_tokens``, and those that are blank."""
    return {
        "answers": len(responses),
        "cut_off": sum(not response.finished for response in responses),
        "empty": sum(not response.text.strip() for response in responses),
    }
