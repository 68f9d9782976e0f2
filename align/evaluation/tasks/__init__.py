"""Tasks by their settings, and the identities of an evaluation's outside inputs for the stage's key. Torch-free.

A plan imports only the tasks that it uses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align import registry
from align.config.base import settings_for_key
from align.config.scores import MetricFunction, score_identities
from align.config.stages.evaluate import BaselineConfig, EvaluateConfig
from align.config.stages.evaluation.during_training import TrainingEvaluation
from align.config.stages.evaluation.task_fields import TaskConfig
from align.errors import UserError
from align.evaluation.tasks.base import Task, TaskInputs
from align.registry import load, registered


def build_task(name: str, config: TaskConfig, inputs: TaskInputs) -> Task:
    """Build the task that ``config`` describes."""
    task: Task = load(registered(registry.Task)[config.kind].code).build(name, config, inputs)
    return task


def task_identities(config: Any, base: Path) -> dict[str, str]:
    """Return digests or revisions of everything outside the store that the task reads.

    Raises ``UserError`` for a missing file.
    """
    from align.evaluation.tasks.records import file_identities

    path = registered(registry.Task)[config.kind].identities
    digests: dict[str, str] = load(path)(config, base) if path else file_identities(config, base)
    return digests


def identities(config: EvaluateConfig, base: Path) -> dict[str, str]:
    """Return digests of everything read outside the store, and the settings of each task and baseline.

    Relative paths start at ``base``. Raises ``UserError`` for a missing file, with the setting that names it.
    """
    digests = score_identities(config.score)
    for number, entry in enumerate(config.metrics):
        place = f"metrics[{number}]"
        settings = MetricFunction(function=entry) if isinstance(entry, str) else entry
        digests[place] = settings.identity(place)
    for name, task in config.tasks.items():
        digests |= _block_identities(f"tasks.{name}", task, base)
    for name, baseline in config.baselines.items():
        digests |= _block_identities(f"baselines.{name}", baseline, base)
    return digests


def training_identities(evaluation: TrainingEvaluation, base: Path) -> dict[str, str]:
    """Return the settings of a training stage's ``evaluate``, and of each task with the digests of its files."""
    settings = settings_for_key(evaluation, evaluation.model_dump(mode="json", exclude=set(evaluation.identified)))
    digests = {"evaluate": json.dumps(settings, sort_keys=True)}
    for name, task in evaluation.tasks.items():
        digests |= _block_identities(f"evaluate.tasks.{name}", task, base)
    return digests


def _block_identities(place: str, block: TaskConfig | BaselineConfig, base: Path) -> dict[str, str]:
    # Imported late, because the module of the systems imports this package.
    from align.evaluation.systems import example_identities

    settings = settings_for_key(block, block.model_dump(mode="json", exclude=set(block.identified)))
    digests = {place: json.dumps(settings, sort_keys=True)}
    try:
        outside = task_identities(block, base) if isinstance(block, TaskConfig) else example_identities(block, base)
    except UserError as error:
        raise UserError(f"{place}.{error}") from None
    return digests | {f"{place}.{key}": value for key, value in outside.items()}
