"""Settings of ``evaluate:`` in a training stage: tasks of evaluations on rows that are not reported. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.config.runtime.launch import LaunchConfig
from align.config.stages.evaluate import NAME, AnyTask, add_task_kinds
from align.config.stages.evaluation.task_fields import RecordFields
from align.config.stages.evaluation.tasks import (
    EnvironmentTaskConfig,
    JudgedConfig,
    LmEvalConfig,
    PerplexityConfig,
    PreferenceConfig,
    RewardPairsConfig,
)
from align.config.tuning import TuningBase

AT_MOST = 0.1
"""Default limit on the share of a stage's time."""


class EarlyStopping(Config):
    """Stop before the last step, by the loss on the validation rows or by ``evaluate.best_metric``."""

    patience: int = Field(3, ge=1)
    """Evaluations in a row, ``eval_steps`` or ``evaluate.every`` apart, without an improvement on the best."""
    min_improvement: float = Field(0.0, ge=0)
    """Change of the loss or metric that counts as an improvement."""


class TrainingEvaluation(Config):
    """Tasks of `align eval` that run during training. Their items must not be rows of a ``test`` split."""

    every: int = Field(ge=1)
    """Optimizer steps between evaluations, or updates in RL. The model is also evaluated before the first step and
    after the last."""
    tasks: dict[str, AnyTask] = Field(min_length=1)
    """Tasks by name, as in an ``evaluate`` stage: ``gsm8k: {files: [...], max_items: 64}``."""
    at_most: float | None = Field(None, gt=0, le=1)
    """Largest share of the stage's time. An evaluation that would exceed it is skipped and counted. By default 0.1; no
    limit with ``best_metric``, because skipped evaluations would make the choice depend on the clock."""
    best_metric: str | None = None
    """Metric that ``keep: best`` and ``early_stopping`` use instead of the validation loss or score:
    ``gsm8k.final``."""
    max_context: int = Field(2048, ge=16)
    """Tokens of a task's conversation and its answer together, up to the model's positions. A longer conversation is
    not answered, and is counted."""

    identified: ClassVar[frozenset[str]] = frozenset({"tasks"})

    @field_validator("tasks", mode="before")
    @classmethod
    def _add_task_kinds(cls, tasks: Any) -> Any:
        return add_task_kinds(tasks)

    @property
    def time_limit(self) -> float | None:
        """``at_most``, or its default; None for no limit."""
        return AT_MOST if self.at_most is None and self.best_metric is None else self.at_most

    @property
    def reads_stage_pairs(self) -> bool:
        """True if a task reads pairs that are held back from the stage's data."""
        return any(isinstance(task, PreferenceConfig) and task.reads_stage_pairs for task in self.tasks.values())

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        for name, task in self.tasks.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"tasks: '{name}' is not a valid name; use letters, digits, - and _.")
            objection = _objection(task)
            if objection is not None:
                raise ValueError(f"tasks.{name}: {objection}.")
        return self

    @model_validator(mode="after")
    def _check_best_metric(self) -> Self:
        if self.best_metric is not None and self.best_metric.partition(".")[0] not in self.tasks:
            raise ValueError(
                f"best_metric '{self.best_metric}' belongs to none of the tasks ({', '.join(self.tasks)}); write "
                "task.metric, such as gsm8k.final."
            )
        return self

    def model_objection(self, *, has_vocabulary: bool, has_pairs: bool, tuning: TuningBase) -> str | None:
        """Return why a stage's model cannot run the tasks, with a remedy; None if it can.

        ``has_pairs``: the stage trains on pairs that may be held back.
        """
        for name, task in self.tasks.items():
            scores = isinstance(task, RewardPairsConfig)
            if has_vocabulary == scores:
                model = "a policy, which scores no pairs" if scores else "a reward model, which has no vocabulary"
                remedy = "preference" if scores else "reward_pairs"
                return f"tasks.{name}: this stage trains {model}; use the task {remedy}."
        if self.reads_stage_pairs and not has_pairs:
            return "tasks: a preference task without files needs a stage that trains on pairs; name its files."
        if tuning.input_only:
            return f"tuning {tuning.method} changes every input, which tasks support only in a finished checkpoint."
        return None

    def launch_objection(self, launch: LaunchConfig) -> str | None:
        """Return why the processes cannot evaluate, with a remedy; None if they can."""
        if launch.strategy == "ddp" or launch.known == 1:
            return None
        return (
            f"evaluate runs in the first process, which does not hold the model with strategy {launch.strategy}; take "
            "ddp, or evaluate the finished checkpoint."
        )


def _objection(task: Any) -> str | None:
    """Return why a task cannot run during training, with a remedy; None if it can."""
    if isinstance(task, LmEvalConfig):
        return "lm_eval loads a finished checkpoint in another process; run it in an evaluate stage"
    if isinstance(task, JudgedConfig) and (task.judge.reward or (task.judging_mode, task.against) == ("compare", None)):
        return "there is no other system and no reward stage here; use `mode: grade`, or `against: file`"
    if isinstance(task, JudgedConfig) and task.against not in (None, "file"):
        return f"there is no {task.against} to compare with here; use `against: file`, or `mode: grade`"
    stage = None
    if isinstance(task, PerplexityConfig):
        stage = task.texts
    if isinstance(task, EnvironmentTaskConfig):
        user = task.environment.user
        stage = task.rows or (None if user is None else user.model)
    if stage is not None:
        return f"a task reads the test split of stage '{stage}', and has no other stages here; name files"
    return _split_objection(task) if isinstance(task, RecordFields) else None


def _split_objection(task: RecordFields) -> str | None:
    """Refuse the split of a Hub dataset that evaluations report."""
    defaults: Mapping[str, str] = task.hub_defaults() or {}
    dataset = task.dataset or (defaults.get("dataset") if task.revision is not None else None)
    if task.files is not None or dataset is None:
        return None
    # A dataset that is not the benchmark's own has the split test by default.
    default = defaults.get("split", "test") if dataset == defaults.get("dataset") else "test"
    if (task.split or default) != "test":
        return None
    return f"the test split of {dataset} is for reported evaluations; name another `split`, such as train"
