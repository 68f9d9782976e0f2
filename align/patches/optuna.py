"""Patches of Optuna."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from align.errors import UserError


def trial_id(trial: Any) -> int:
    """Return the number by which a study's storage knows a ``FrozenTrial``.

    Reads ``FrozenTrial._trial_id``: Optuna has no public way to continue a trial that another process began, or to
    start a certain queued trial. The patch was written for Optuna 5.0.

    Raises:
        UserError: if the trial has no such attribute.
    """
    if not hasattr(trial, "_trial_id"):
        version = importlib.metadata.version("optuna")
        raise UserError(f"optuna {version}: trials have no _trial_id. Install optuna 5.0.")
    number: int = trial._trial_id
    return number
