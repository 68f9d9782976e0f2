"""Settings of the stages ``evaluate`` and ``report``. Torch-free.

The name of an evaluation task in the YAML is its kind, unless ``task:`` below it names the kind.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config, PrecisionSetting, rename_in_block, stage_input
from align.config.chat_template import (
    TEMPLATE_FIELDS,
    TemplateVariables,
    Thinking,
    ThinkingBudget,
    check_thinking_budget,
    turn_limit,
)
from align.config.environment import USER_INPUT
from align.config.scores import MetricFunction, Score, metric_functions, reward_names
from align.config.stages.evaluation.gates import KL_PREFIX, GateSpec, parse_gates
from align.config.stages.evaluation.task_fields import SamplingFields, TaskConfig
from align.config.stages.evaluation.tasks import (
    EnvironmentTaskConfig,
    JudgedConfig,
    PerplexityConfig,
    PreferenceConfig,
    RewardPairsConfig,
)
from align.config.user_paths import UserPath
from align.config.validation import suggest
from align.registry import Task, failure_note, loaded
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
"""Names of tasks and baselines."""
PROMPT_SET = "prompts"
"""Name of the prompt set among the tasks."""
TASK_INPUTS = ("texts", "rows", USER_INPUT)
"""Fields of tasks that name a stage."""
THOUGHT_METRICS = ("thought_length", "open_thoughts")
"""Metrics of the prompt set if responses have thoughts."""
PROMPT_METRICS = ("reward", "finished", "length", "kl", "kl_k3", "heldout_loss", *THOUGHT_METRICS)
"""Metrics that belong to no task and to no function, as gates name them."""


TASK_CONFIGS: dict[str, type[TaskConfig]] = loaded(Task, lambda task: task.settings)
"""Kind → its settings, in the order of the guide."""

if TYPE_CHECKING:
    AnyTask = TaskConfig
else:
    AnyTask = Annotated[functools.reduce(operator.or_, TASK_CONFIGS.values()), Field(discriminator="task")]
    """Settings of any task."""


def add_task_kinds(tasks: Any) -> Any:
    """Return the ``tasks`` block with every task's kind spelled out.

    Raises ``ValueError`` for a name that is no kind.
    """
    if not isinstance(tasks, Mapping):
        return tasks
    blocks: dict[Any, Any] = {}
    for name, block in tasks.items():
        if not isinstance(block, Mapping) or "task" in block:
            blocks[name] = block
        elif name in TASK_CONFIGS:
            blocks[name] = {"task": name, **block}
        else:
            raise ValueError(
                f"'{name}' is not a kind of task.{suggest(str(name), TASK_CONFIGS)} (A name of your own needs `task:` "
                f"below it.){failure_note()}"
            )
    return blocks


class BaselineConfig(Config):
    """A checkpoint used in another way: prompted, the best of several answers, or only sampled again."""

    of: str
    """The checkpoint that answers, from ``policies``."""
    system: str = ""
    """A system message before every conversation; it precedes the conversation's own system message, if any."""
    shots: int = Field(0, ge=0, le=64)
    """Solved examples shown as earlier turns."""
    examples: UserPath | None = None
    """JSON lines with ``question`` and ``answer`` (or ``prompt`` and ``completion``) for ``shots``, used in their
    order. The default is each task's examples, or answers of the train split of ``prompts`` for a task without
    examples."""
    best_of: int = Field(1, ge=1, le=1024)
    """Answers sampled for each answer kept, which is the answer that ``reward`` scores highest."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of ``best_of`` if a task itself decodes greedily, which would give N equal answers."""

    sample_seed: int | None = Field(None, ge=0, lt=2**31)
    """Sample once more, with this seed: a comparison of a checkpoint with itself (A/A), the noise floor of the table.
    Greedy answers do not change."""

    identified: ClassVar[frozenset[str]] = frozenset({"examples"})

    @model_validator(mode="after")
    def _check_single_change(self) -> Self:
        is_prompted = bool(self.system or self.shots)
        # A baseline changes one setting, so a difference has one cause.
        ways = is_prompted + (self.best_of > 1) + (self.sample_seed is not None)
        if ways == 0:
            raise ValueError(f"is '{self.of}' as it is; say system, shots, best_of or sample_seed")
        if ways > 1:
            raise ValueError("mixes prompting, best_of and sample_seed; compare them as separate baselines")
        if self.examples is not None and not self.shots:
            raise ValueError("examples are read for shots, and shots is 0")
        return self


class EvaluateConfig(Config):
    """The compared systems, the prompts and tasks they answer, and the scorers of their answers."""

    policies: list[stage_input(*GENERATORS)] = Field(min_length=1)  # type: ignore[valid-type]
    """Stages whose checkpoints are compared, in the order the report shows them."""
    reference: stage_input(*GENERATORS) = Field(  # type: ignore[valid-type]
        default_factory=lambda fields: fields.get("policies", [""])[0]
    )
    """Policy that differences and KL are computed against, usually the SFT stage; by default the first."""
    prompts: stage_input(*PROMPT_SOURCES) | None = None  # type: ignore[valid-type]
    """Stage whose ``test`` split has the prompts; omit it to run only ``tasks``."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Reward model that scores the responses; its score is shown next to the gold score as a proxy."""
    second_reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """A second reward model, to measure how far the two agree."""
    pairs: stage_input(Kind.PREFERENCES) | None = None  # type: ignore[valid-type]
    """Preferences whose ``test`` split measures reward models, and which the task ``preference`` reads."""
    heldout: stage_input(Kind.INSTRUCTIONS) | None = None  # type: ignore[valid-type]
    """Instructions whose ``test`` split gives every checkpoint's loss per token on reference answers."""
    texts: list[stage_input(Kind.TEXTS)] = Field([])  # type: ignore[valid-type]
    """Plain texts whose ``test`` split the task ``perplexity`` reads: ``domain: {task: perplexity, texts: books}``."""
    rows: list[stage_input(*PROMPT_SOURCES)] | None = Field(None, min_length=1)  # type: ignore[valid-type]
    """Stages of prompts whose ``test`` split tasks of the kind ``environment`` play: ``sums: {task: environment, rows:
    data, environment: {...}}``."""
    users: list[stage_input(*GENERATORS)] | None = Field(None, min_length=1)  # type: ignore[valid-type]
    """Stages whose checkpoints play the user in tasks of the kind ``environment``: ``environment: {user: {model: sft,
    ...}, ...}``."""
    score: Score = None
    """A program that scores responses (``gold`` or ``package.module:function``), a metric called what its function is
    called; or a list of rewards: the metric ``score`` is their weighted sum, ``score_<name>`` each of them."""
    metrics: list[str | MetricFunction] = Field([])
    """Further programs that score responses: ``package.module:function``, ``{math: answer}``, or with a name and a
    direction ``{function: mine:errors, name: errors, better: lower}``. The first metric of ``score`` and these
    decides."""
    tasks: dict[str, AnyTask] = Field({})
    """Benchmarks and checks by name: ``ifeval: {files: [...]}``; a name of your own needs ``task:`` with the kind."""
    baselines: dict[str, BaselineConfig] = Field({})
    """Ways to use a checkpoint without training it, by name: prompted, or the best of N answers."""
    gates: dict[str, GateSpec] = Field({})
    """Bounds on metrics: ``ifeval.prompt_strict: ">= sft - 0.02"``. A run that violates one ends with exit code 1, once
    everything else is done and written."""
    max_prompts: int | None = Field(None, ge=1)
    """At most so many prompts, drawn by seed; intervals narrow with the square root of it. All by default."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt and checkpoint, averaged before the statistics: less variance, more time."""
    max_tokens: int = Field(64, ge=1)
    """Longest response to a prompt, in tokens; a longer one is cut and counts as not finished. Tasks have their own
    limit."""
    thinking_budget: ThinkingBudget = None
    """Close thoughts by force after this many tokens, also in tasks, and continue with the answers
    (docs/thinking.md). Null: no limit."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Prompts longer than this under any checkpoint's template are skipped and counted."""
    max_context: int = Field(2048, ge=16)
    """Tokens of a task's conversation and its answer together that the engine reserves, up to the model's positions. A
    longer conversation is not answered, and is counted."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of ``prompts``; KL is measured at the same one. 0 is greedy and leaves KL out."""
    thinking: Thinking = None
    """``on`` or ``off`` sets the thinking switch of every policy's chat template; by default as each checkpoint has it
    (docs/thinking.md)."""
    chat_template_kwargs: TemplateVariables = Field({})
    """Variables of every policy's chat template, in place of the checkpoints'."""
    max_pairs: int | None = Field(None, ge=1)
    """At most so many held-out pairs, drawn by seed."""
    max_heldout: int | None = Field(256, ge=1)
    """At most so many held-out answers, drawn by seed."""
    max_heldout_length: int = Field(1024, ge=2)
    """Held-out rows longer than this, in tokens, are skipped and counted."""
    precision: PrecisionSetting = "auto"
    """Type of the matrix products, in sampling and scoring; ``auto`` measures which one is faster here."""
    bootstrap: int = Field(10_000, ge=100)
    """Resamples behind every interval and permutation test; the smallest p-value is about 1 / this."""

    identified: ClassVar[frozenset[str]] = frozenset({"tasks", "baselines"})
    keyed_when_set: ClassVar[frozenset[str]] = TEMPLATE_FIELDS | {"metrics", "rows", "thinking_budget", "users"}

    def fields_outside_key(self) -> set[str]:
        """Return ``identified``, and also ``score`` if it is a list, whose rates and prices change no result."""
        return {*self.identified, *(("score",) if isinstance(self.score, list) else ())}

    @field_validator("tasks", mode="before")
    @classmethod
    def _add_task_kinds(cls, tasks: Any) -> Any:
        return add_task_kinds(tasks)

    @model_validator(mode="after")
    def _check_consistent(self) -> EvaluateConfig:
        if self.reference not in self.policies:
            raise ValueError(
                f"reference '{self.reference}' is not among policies ({', '.join(self.policies)}); add it to them, "
                "or name one of them."
            )
        if len(set(self.policies)) < len(self.policies):
            raise ValueError("policies names a stage twice; name each once.")
        if self.prompts is None and not self.tasks and self.pairs is None and self.heldout is None:
            raise ValueError("nothing to evaluate on; name a stage of prompts, or tasks.")
        if self.pairs is not None and self.reward is None and not self._has_task("preference"):
            raise ValueError("pairs measures a reward model, but reward is missing; name a reward stage.")
        if self.second_reward is not None and self.reward is None:
            raise ValueError("second_reward is compared with reward, which is missing; name it as reward.")
        for name, task in self.tasks.items():
            if isinstance(task, PerplexityConfig):
                _require_input(f"tasks.{name}: texts", task.texts, "texts", self.texts)
            if isinstance(task, EnvironmentTaskConfig):
                _require_input(f"tasks.{name}: rows", task.rows, "rows", self.rows or [])
                user = task.environment.user
                model = None if user is None else user.model
                _require_input(f"tasks.{name}: environment.user.model", model, "users", self.users or [])
            if isinstance(task, PreferenceConfig) and task.reads_stage_pairs and self.pairs is None:
                raise ValueError(f"tasks.{name}: there are no pairs; name the stage's `pairs`, or files of its own.")
            if isinstance(task, RewardPairsConfig) and self.reward is None:
                raise ValueError(f"tasks.{name}: measures a reward model; name a reward stage as `reward`.")
            if isinstance(task, JudgedConfig):
                field = task.judge.reward_field
                if field is not None and getattr(self, field) is None:
                    raise ValueError(
                        f"tasks.{name}.judge.reward: the stage has no {field}; name a reward stage as `{field}`."
                    )
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise ValueError(
                "samples_per_prompt above 1 would be identical at temperature 0; raise temperature or drop "
                "samples_per_prompt."
            )
        if (self.score is not None or self.metrics) and self.prompts is None:
            raise ValueError("score and metrics are programs for the responses to prompts; name prompts.")
        names = [function.metric for function in self.metric_functions]
        for name, function in zip(names, self.metric_functions, strict=True):
            if name in (*PROMPT_METRICS, *self.reward_metrics):
                source = f"function: {function.function}" if function.function else f"{function.verifier}: ..."
                remedy = f"metrics: [{{{source}, name: my_{name}}}]"
                raise ValueError(f"'{name}' is a metric of its own, so a function needs another name: {remedy}")
            if names.count(name) > 1:
                raise ValueError(f"metrics: two metrics are called '{name}'; give one of them another name.")
        return self

    @model_validator(mode="after")
    def _check_thinking_budget(self) -> EvaluateConfig:
        for place, limit in self.response_limits.items():
            check_thinking_budget(self.thinking_budget, limit, place)
        return self

    @property
    def response_limits(self) -> dict[str, int]:
        """Most tokens of a response to the prompts, and in each task whose answers are sampled, by their field."""
        limits = {} if self.prompts is None else {"max_tokens": self.max_tokens}
        for name, task in self.tasks.items():
            if isinstance(task, EnvironmentTaskConfig):
                limits[f"tasks.{name}.environment.turn_max_tokens"] = turn_limit(task.environment)
            elif isinstance(task, SamplingFields | JudgedConfig):
                limits[f"tasks.{name}.max_tokens"] = task.max_tokens
        return limits

    @property
    def metric_functions(self) -> list[MetricFunction]:
        """The programs that are separate metrics, in order: a single program of ``score``, then ``metrics``."""
        return metric_functions([self.score, *self.metrics] if isinstance(self.score, str) else self.metrics)

    @property
    def reward_metrics(self) -> list[str]:
        """Names of the metrics of a list ``score``: their sum, and each reward."""
        if not isinstance(self.score, list):
            return []
        return ["score", *(f"score_{name}" for name in reward_names(self.score))]

    @model_validator(mode="after")
    def _check_names_and_gates(self) -> EvaluateConfig:
        for field, names in (("tasks", self.tasks), ("baselines", self.baselines)):
            for name in names:
                if not NAME.fullmatch(name) or name == PROMPT_SET:
                    raise ValueError(
                        f"{field}: '{name}' is not a valid name; use letters, digits, - and _, and not {PROMPT_SET}."
                    )
        for name, baseline in self.baselines.items():
            if name in self.policies:
                raise ValueError(f"baselines: '{name}' is a stage already; choose another name.")
            if baseline.of not in self.policies:
                raise ValueError(
                    f"baselines.{name}: of '{baseline.of}' is none of policies ({', '.join(self.policies)})"
                )
            if baseline.best_of > 1 and self.reward is None:
                raise ValueError(f"baselines.{name}: best_of keeps the answer with the highest reward; name reward.")
        systems = [*self.policies, *self.baselines]
        programs = [*(function.metric for function in self.metric_functions), *self.reward_metrics]
        parse_gates(self.gates, systems, self.reference, list(self.tasks), [*programs, *PROMPT_METRICS])
        return self

    def _has_task(self, kind: str) -> bool:
        return any(task.kind == kind for task in self.tasks.values())

    @classmethod
    def rename_stages(cls, block: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
        """Return the block as the YAML has it, with stages renamed also where baselines and gates name them."""
        renamed = dict(block)
        baselines = block.get("baselines")
        gates = block.get("gates")
        tasks = block.get("tasks")
        if isinstance(baselines, dict):
            renamed["baselines"] = {name: rename_in_block(spec, "of", rename) for name, spec in baselines.items()}
        if isinstance(tasks, dict):
            renamed["tasks"] = {name: _rename_task(spec, rename) for name, spec in tasks.items()}
        if isinstance(gates, dict):
            renamed["gates"] = {
                _rename_key(str(key), rename): _rename_words(spec, rename) for key, spec in gates.items()
            }
        return renamed


def _require_input(place: str, name: str | None, field: str, stage_names: list[str]) -> None:
    """Raise ``ValueError`` if a task names a stage that is not among the evaluation's stages."""
    if name is not None and name not in stage_names:
        raise ValueError(
            f"{place} '{name}' is none of the stage's {field} ({', '.join(stage_names) or 'none'}); add it there."
        )


def _rename_task(spec: Any, rename: Callable[[str], str]) -> Any:
    """Rename the stages that a task reads: ``texts`` of perplexity, ``rows`` and the user of an environment."""
    for field in TASK_INPUTS:
        spec = rename_in_block(spec, field, rename)
    return spec


def _rename_key(key: str, rename: Callable[[str], str]) -> str:
    """Rename the stages in a gate's key: ``dpo/gold``, ``kl_to_dpo``."""
    system, slash, metric = key.rpartition("/")
    if metric.startswith(KL_PREFIX):
        # A stage's name may also hide in the metric.
        metric = KL_PREFIX + rename(metric.removeprefix(KL_PREFIX))
    return f"{rename(system)}/{metric}" if slash else metric


def _rename_words(spec: Any, rename: Callable[[str], str]) -> Any:
    """Rename every stage in a bound, or in a gate's ``systems``."""
    if isinstance(spec, str):
        return NAME.sub(lambda match: rename(match.group()), spec)
    if isinstance(spec, list):
        return [_rename_words(item, rename) for item in spec]
    if isinstance(spec, dict):
        return {
            key: _rename_words(value, rename) if key in ("bound", "systems") else value for key, value in spec.items()
        }
    return spec


SHOWN = tuple(kind for kind in Kind if kind != Kind.REPORT)


class ReportConfig(Config):
    """The report's contents."""

    scorecard: stage_input(Kind.SCORECARD) | None = None  # type: ignore[valid-type]
    """Evaluation whose results and samples are shown; without one the page has only costs and curves."""
    stages: list[stage_input(*SHOWN)] = Field(default_factory=list)  # type: ignore[valid-type]
    """Stages to show, with curves, cost and settings, in this order."""
    title: str = Field("Alignment report", min_length=1, max_length=120)
    """Heading of the page."""

    @model_validator(mode="after")
    def _check_shows_something(self) -> ReportConfig:
        if self.scorecard is None and not self.stages:
            raise ValueError("nothing to show; list stages, or name a scorecard.")
        return self
