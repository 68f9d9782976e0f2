"""Identities of an evaluation's outside inputs, for the stage's key. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

from align.config.base import settings_for_key
from align.config.metric_functions import MetricFunction
from align.config.scores import score_identities, scoring_identity
from align.config.stages.evaluate import BaselineConfig, EvaluateConfig
from align.config.stages.evaluation_fields import TaskConfig
from align.errors import UserError
from align.evaluation.systems import example_identities
from align.evaluation.tasks.registry import task_identities


def identities(config: EvaluateConfig, base: Path) -> dict[str, str]:
    """Return digests of everything read outside the store, and the settings of tasks and baselines, one by one.

    Relative paths start at ``base``. Raises ``UserError`` for a missing file, with the setting that names it.
    """
    digests = score_identities(config.score)
    for number, entry in enumerate(config.metrics):
        place = f"metrics[{number}]"
        settings = MetricFunction(function=entry) if isinstance(entry, str) else entry
        digests[place] = scoring_identity(settings.function, settings.arguments, place)
    for name, task in config.tasks.items():
        digests |= _block_identities(f"tasks.{name}", task, base)
    for name, baseline in config.baselines.items():
        digests |= _block_identities(f"baselines.{name}", baseline, base)
    return digests


def _block_identities(place: str, block: TaskConfig | BaselineConfig, base: Path) -> dict[str, str]:
    settings = settings_for_key(block, block.model_dump(mode="json", exclude=set(block.identified)))
    digests = {place: json.dumps(settings, sort_keys=True)}
    try:
        outside = task_identities(block, base) if isinstance(block, TaskConfig) else example_identities(block, base)
    except UserError as error:
        raise UserError(f"{place}.{error}") from None
    return digests | {f"{place}.{key}": value for key, value in outside.items()}
