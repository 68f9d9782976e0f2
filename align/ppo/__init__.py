"""PPO with a critic on transformers' Trainer: ``from align.ppo import PPOConfig, PPOTrainer``.

Both names are imported on first use, so that importing a module of this package never loads torch by accident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.ppo.config import PPOConfig
    from align.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]

_HOMES = {"PPOConfig": "align.ppo.config", "PPOTrainer": "align.ppo.trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
