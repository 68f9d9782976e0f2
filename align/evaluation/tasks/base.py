"""What a task is: items, what is asked of each system about them, and one number per item and sample. Torch-free.

An evaluation has phases, so that a machine holds one thing at a time: every system answers every task (``respond``, a
rollout engine is there), then reads given text (``weigh``, its own forward pass), and then answers are scored
(``score``: programs, reward models, judges). A task takes part in the phases it needs. Statistics are not its business.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from align.config.base import Config
from align.config.runtime import Runtime
from align.data.rows import Message
from align.inference.protocol import Response, Sampling
from align.store.artifacts import Artifact

Values = list[list[float]]
"""Per item, one number for each sample; a task without samples has one."""


@dataclass(frozen=True)
class Metric:
    """How a number is shown."""

    title: str
    better: Literal["higher", "lower"] | None
    unit: str
    meaning: str
    halves: bool = False
    """Whether it is a win rate: 1 for won, 0 for lost, 0.5 for neither."""


@dataclass(frozen=True)
class Item:
    """One question of a task, as the scorecard and the samples name it."""

    id: str
    source: str
    """Category, for the table by source: one name where a task has none."""
    prompt: list[Message]
    """What is asked, for the reader of samples."""
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Whatever the task needs to score it."""


@dataclass(frozen=True)
class Turn:
    """A system's answer and the conversation that it answered, without the system's own way of prompting."""

    prompt: list[Message]
    response: Response


Answers = list[list[list[Turn]]]
"""Of one system: per item, per sample, its turns, the last one last; most tasks have one turn."""


@dataclass
class Measured:
    """One system's numbers in a task. Every metric has as many entries as the task has items, in their order."""

    values: dict[str, Values]
    """Metric → values, without the task's name: ``prompt_strict``."""
    weights: dict[str, list[float]] = field(default_factory=dict)
    """For metrics that are a ratio of sums (loss per token, share of instructions): the weight of each item, and the
    value is per unit of weight. Weight 0 says that an item has no such number (XSTest's safe prompts, for the rate of
    unsafe ones refused): its value is a 0 that means nothing, and statistics leave the item out, also of their n."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Counts that a reader should see beside the numbers: verdicts that could not be read, answers cut off."""
    estimates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metric → its estimate, where the task makes it itself; else the scorecard makes it of the values."""


@dataclass(frozen=True)
class Example:
    """A question with its answer, for prompting with examples."""

    question: str
    answer: str


@dataclass(frozen=True)
class SystemInfo:
    """A compared system: a checkpoint, or a way to use one."""

    name: str
    of: str
    """The stage whose checkpoint answers; equals ``name`` for a checkpoint as it is."""
    role: Literal["base", "checkpoint", "prompted", "best_of", "again"]
    key: str
    """Digest that changes with whatever changes its answers: the checkpoint's key, the way of prompting."""
    system: str = ""
    shots: int = 0
    best_of: int = 1


class Respondent(Protocol):
    """One system while the engine holds its weights."""

    info: SystemInfo

    def answer(
        self,
        prompts: Sequence[list[Message]],
        sampling: Sampling,
        examples: Sequence[Example] = (),
        *,
        going_on: bool = False,
    ) -> list[list[Response]]:
        """Responses to each conversation, ``sampling.n`` of them (times N for a best-of-N system); kept on disk.

        ``going_on`` is for later turns of conversations that this system already has N times over: no further times N.

        The system's own way of prompting (a system message, examples) is added here. ``examples`` are the task's, which
        a system prompted with examples takes from in order; it raises ``UserError`` where it needs more than there are.
        """
        ...


class Reader(Protocol):
    """One system's own forward pass. Systems of role ``best_of`` are not asked to read: they have no distribution."""

    info: SystemInfo
    tokenizer: Any
    model_dir: Path
    """Folder of the checkpoint, for what loads it itself."""
    runtime: Runtime
    """Where and how: device, threads, the engine's memory."""
    max_length: int
    """Tokens that the model can read at once (its positions, or its tokenizer's limit where that is lower)."""

    def render(self, prompt: list[Message], examples: Sequence[Example] = ()) -> list[int]:
        """Ids of a conversation up to where the answer begins, the system's own way of prompting included."""
        ...

    def logprobs(self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token of a continuation, in nats, at temperature 1; no context may be empty."""
        ...

    def kept(self, name: str, identity: Any, compute: Callable[[], Any]) -> Any:
        """``compute()``'s JSON-able result, or that of an earlier run for this system under the same ``identity``."""
        ...


class Bench(Protocol):
    """What scoring may use. Nothing is loaded before it is asked for."""

    seed: int
    reference: str
    """The system that others are compared with."""
    base: str | None
    folder: Path
    """Kept between attempts of the stage, for whatever is dear: a cache of judgments."""
    shared: Path | None
    """Kept between runs too, where there is such a place."""

    def reward_stage(self, which: str = "reward") -> str | None:
        """The stage that made a reward model; None where the stage was given none."""
        ...

    def reward_scores(
        self, prompts: Sequence[list[Message]], answers: Sequence[str], finished: Sequence[bool], which: str = "reward"
    ) -> list[float]:
        """Scores by the stage's reward model, or its ``second_reward``.

        Raises ``UserError`` where the stage was given none.
        """
        ...

    def warn(self, message: str) -> None:
        """A warning the user sees."""
        ...

    def progress(self, done: float, total: float, unit: str) -> None:
        """How far it is."""
        ...


class TaskConfig(Config):
    """Settings that every task has. A subclass has ``task: Literal[...]`` and makes its task in ``build``."""

    @property
    def kind(self) -> str:
        """Which kind of task this is."""
        return str(getattr(self, "task", ""))

    def identities(self, base: Path) -> dict[str, str]:
        """Digests or revisions of everything outside the store that is read; raises ``UserError`` for what is missing.

        Fields that only say where something lies belong into ``identified``, as in any config.
        """
        return {}

    def build(self, name: str, given: Given) -> Task:
        """Read the items. Called once, before anything expensive; raises ``UserError`` for data that does not fit."""
        raise NotImplementedError


@dataclass(frozen=True)
class Given:
    """What a task is built from beside its settings."""

    seed: int
    base: Path
    """Where relative paths start."""
    pairs: list[dict[str, Any]]
    """Rows of the stage's ``pairs``, test split; empty without."""
    heldout: list[dict[str, Any]]
    """Rows of the stage's ``heldout``, test split."""
    has_reward: bool
    has_second_reward: bool
    precision: Literal["bfloat16", "float32"]
    warn: Callable[[str], None]
    texts: Mapping[str, Artifact] = field(default_factory=dict)
    """The stage's ``texts``, by the name of the stage that made them."""


class Task(ABC):
    """One task. Subclasses set the attributes below and override the phases they take part in."""

    responds: ClassVar[bool] = False
    reads: ClassVar[bool] = False
    renders: bool = False
    """Whether what is read is a conversation, with the system's own prompt and examples before it."""

    name: str
    """Name in the YAML, the part before the dot in ``ifeval.prompt_strict``."""
    kind: str
    title: str
    items: list[Item]
    metrics: dict[str, Metric]
    """In the order shown; the first one is the task's headline unless ``primary`` says otherwise."""
    primary: str

    def examples(self, count: int) -> list[Example]:
        """At most ``count`` solved questions that are none of the items; empty where the task has none."""
        return []

    def check(self, info: SystemInfo) -> None:  # noqa: B027  (most tasks can be asked of any system)
        """Raise ``UserError`` for a system that cannot be asked, such as one that shows more examples than there are.

        Called for every system before anything expensive.
        """

    def settings(self) -> dict[str, Any]:
        """JSON-able: what a reader needs to reproduce the numbers (data, template, tokens, sampling, rubric, seed)."""
        return {}

    def respond(self, respondent: Respondent) -> Answers:
        """Have one system answer; for tasks with ``responds``."""
        raise NotImplementedError

    def read(self, reader: Reader) -> Measured:
        """Have one system read; for tasks with ``reads``."""
        raise NotImplementedError

    def score(self, answers: Mapping[str, Answers], bench: Bench) -> dict[str, Measured]:
        """Numbers of every system that answered, by its name. ``answers`` is empty for a task without ``responds``."""
        return {}

    def item_values(self) -> dict[str, list[dict[str, list[float | None]]]]:
        """Numbers of items that are no compared system's: whose (a reward model's stage) → item → name → numbers."""
        return {}

    def item_answers(self) -> list[dict[str, list[dict[str, Any]]]]:
        """Answers that came with the items and were scored, by item: side → answers, as ``samples.jsonl`` has them."""
        return []

    def extras(self) -> dict[str, Any]:
        """JSON-able results that are no metric of a system, after everything was scored: ``win_rates``,
        ``reward_models``; see ``scorecard.py``."""
        return {}


def answer_all(task: Task, respondent: Respondent, sampling: Sampling) -> Answers:
    """The usual ``respond``: every item's prompt once."""
    examples = task.examples(respondent.info.shots) if respondent.info.shots else []
    prompts = [list(item.prompt) for item in task.items]
    found = respondent.answer(prompts, sampling, examples)
    return [[[Turn(prompt, one)] for one in samples] for prompt, samples in zip(prompts, found, strict=True)]
