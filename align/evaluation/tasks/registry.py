"""The code of every kind of task, by its settings class. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.stages import evaluation_tasks as configs
from align.config.stages.evaluation_fields import TaskConfig
from align.evaluation.judges import judged
from align.evaluation.lm_eval import task as lm_eval
from align.evaluation.tasks import gsm8k, ifeval, multiple_choice, perplexity, preference, reward_pairs, xstest
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.task_records import file_identities, identities_with_examples


@dataclass(frozen=True)
class TaskKind:
    """The functions behind a settings class."""

    build: Callable[[str, Any, TaskInputs], Task]
    """Reads the items. Called once, before anything expensive; raises ``UserError`` for data that does not fit."""
    identities: Callable[[Any, Path], dict[str, str]] = file_identities
    """Returns digests of everything that is read outside the store; raises ``UserError`` for a missing file."""


TASKS: dict[type[TaskConfig], TaskKind] = {
    configs.IfevalConfig: TaskKind(ifeval.build),
    configs.IfbenchConfig: TaskKind(ifeval.build),
    configs.Gsm8kConfig: TaskKind(gsm8k.build, identities_with_examples),
    configs.MultipleChoiceConfig: TaskKind(multiple_choice.build, identities_with_examples),
    configs.XstestConfig: TaskKind(xstest.build),
    configs.JudgedConfig: TaskKind(judged.build, judged.identities),
    configs.PreferenceConfig: TaskKind(preference.build),
    configs.PerplexityConfig: TaskKind(perplexity.build, perplexity.identities),
    configs.RewardPairsConfig: TaskKind(reward_pairs.build),
    configs.LmEvalConfig: TaskKind(lm_eval.build, lm_eval.identities),
}


def build_task(name: str, config: TaskConfig, inputs: TaskInputs) -> Task:
    """Build the task that ``config`` describes."""
    return TASKS[type(config)].build(name, config, inputs)


def task_identities(config: TaskConfig, base: Path) -> dict[str, str]:
    """Return digests or revisions of everything outside the store that the task reads."""
    return TASKS[type(config)].identities(config, base)
