"""The parts of rollouts and validations that a trainer is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from align.environments.player import EnvironmentPlayer
from align.rl.sampler import AnyScorer

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class RolloutInputs:
    """The trainers' arguments of these names."""

    train_dataset: Rows
    scorer: AnyScorer | None
    """None if only an environment scores."""
    engine: Any
    gold: AnyScorer | None = None
    eval_dataset: Rows | None = None
    ptx_dataset: Rows | None = None
    episodes: EnvironmentPlayer | None = None
    """Plays episodes in an environment, instead of single responses."""
