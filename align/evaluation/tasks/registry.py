"""The code of every kind of task, by its settings class. Torch-free.

Import statements inside functions, so that a plan imports the tasks that it names alone. Import paths as texts would
hide the tasks from the digest of the evaluation's source (``align.pipeline.provenance``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from align.config.stages import evaluation_tasks as configs
from align.config.stages.environment_task import EnvironmentTaskConfig
from align.config.stages.evaluation_fields import TaskConfig
from align.evaluation.tasks.base import Task, TaskInputs


def _ifeval() -> ModuleType:
    from align.evaluation.tasks import ifeval

    return ifeval


def _gsm8k() -> ModuleType:
    from align.evaluation.tasks import gsm8k

    return gsm8k


def _multiple_choice() -> ModuleType:
    from align.evaluation.tasks import multiple_choice

    return multiple_choice


def _xstest() -> ModuleType:
    from align.evaluation.tasks import xstest

    return xstest


def _environment() -> ModuleType:
    from align.evaluation.tasks import environment

    return environment


def _judged() -> ModuleType:
    from align.evaluation.judges import judged

    return judged


def _preference() -> ModuleType:
    from align.evaluation.tasks import preference

    return preference


def _perplexity() -> ModuleType:
    from align.evaluation.tasks import perplexity

    return perplexity


def _reward_pairs() -> ModuleType:
    from align.evaluation.tasks import reward_pairs

    return reward_pairs


def _lm_eval() -> ModuleType:
    from align.evaluation.lm_eval import task

    return task


TASKS: dict[type[TaskConfig], Callable[[], ModuleType]] = {
    configs.IfevalConfig: _ifeval,
    configs.IfbenchConfig: _ifeval,
    configs.Gsm8kConfig: _gsm8k,
    configs.MultipleChoiceConfig: _multiple_choice,
    configs.XstestConfig: _xstest,
    EnvironmentTaskConfig: _environment,
    configs.JudgedConfig: _judged,
    configs.PreferenceConfig: _preference,
    configs.PerplexityConfig: _perplexity,
    configs.RewardPairsConfig: _reward_pairs,
    configs.LmEvalConfig: _lm_eval,
}
"""Settings class -> the function that imports its module.

The module has ``build(name, config, inputs)``, which reads the items. It is called once, before anything expensive, and
raises ``UserError`` for data that does not fit.
"""
OWN_IDENTITIES = (
    EnvironmentTaskConfig,
    configs.JudgedConfig,
    configs.PerplexityConfig,
    configs.LmEvalConfig,
)
"""Settings whose module says by ``identities(config, base)`` what it reads outside the store."""
SHOW_EXAMPLES = (configs.Gsm8kConfig, configs.MultipleChoiceConfig)
"""Settings with a file of worked examples beside the items."""


def build_task(name: str, config: TaskConfig, inputs: TaskInputs) -> Task:
    """Build the task that ``config`` describes."""
    task: Task = TASKS[type(config)]().build(name, config, inputs)
    return task


def task_identities(config: TaskConfig, base: Path) -> dict[str, str]:
    """Return digests or revisions of everything outside the store that the task reads.

    Raises ``UserError`` for a missing file.
    """
    from align.evaluation.tasks.task_records import file_identities, identities_with_examples

    identify: Callable[[Any, Path], dict[str, str]] = file_identities
    if isinstance(config, SHOW_EXAMPLES):
        identify = identities_with_examples
    elif isinstance(config, OWN_IDENTITIES):
        identify = TASKS[type(config)]().identities
    return identify(config, base)
