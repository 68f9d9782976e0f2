"""The code of every kind of task, by its settings class. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from align.config.stages import evaluation_tasks as configs
from align.config.stages.evaluation_fields import TaskConfig
from align.evaluation.tasks.base import Task, TaskInputs
from align.pipeline.registry import load_object


@dataclass(frozen=True)
class TaskKind:
    """Import paths of the functions behind a settings class, so that a plan imports the tasks that it names alone."""

    build: str
    """Reads the items. Called once, before anything expensive; raises ``UserError`` for data that does not fit."""
    identities: str = "align.evaluation.tasks.task_records:file_identities"
    """Returns digests of everything that is read outside the store; raises ``UserError`` for a missing file."""


_WITH_EXAMPLES = "align.evaluation.tasks.task_records:identities_with_examples"
TASKS: dict[type[TaskConfig], TaskKind] = {
    configs.IfevalConfig: TaskKind("align.evaluation.tasks.ifeval:build"),
    configs.IfbenchConfig: TaskKind("align.evaluation.tasks.ifeval:build"),
    configs.Gsm8kConfig: TaskKind("align.evaluation.tasks.gsm8k:build", _WITH_EXAMPLES),
    configs.MultipleChoiceConfig: TaskKind("align.evaluation.tasks.multiple_choice:build", _WITH_EXAMPLES),
    configs.XstestConfig: TaskKind("align.evaluation.tasks.xstest:build"),
    configs.JudgedConfig: TaskKind("align.evaluation.judges.judged:build", "align.evaluation.judges.judged:identities"),
    configs.PreferenceConfig: TaskKind("align.evaluation.tasks.preference:build"),
    configs.PerplexityConfig: TaskKind(
        "align.evaluation.tasks.perplexity:build", "align.evaluation.tasks.perplexity:identities"
    ),
    configs.RewardPairsConfig: TaskKind("align.evaluation.tasks.reward_pairs:build"),
    configs.LmEvalConfig: TaskKind("align.evaluation.lm_eval.task:build", "align.evaluation.lm_eval.task:identities"),
}


def build_task(name: str, config: TaskConfig, inputs: TaskInputs) -> Task:
    """Build the task that ``config`` describes."""
    task: Task = load_object(TASKS[type(config)].build)(name, config, inputs)
    return task


def task_identities(config: TaskConfig, base: Path) -> dict[str, str]:
    """Return digests or revisions of everything outside the store that the task reads."""
    identities: dict[str, str] = load_object(TASKS[type(config)].identities)(config, base)
    return identities
