"""Trainers that learn from their own rollouts: ``from align.rl import PpoConfig, PPOTrainer``.

PPO has a critic; GRPO and its variants, RLOO, online DPO and best-of-N have none. All are transformers' Trainers. Names
are imported on first use, so importing a module of this package never loads torch by accident.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config.stages.best_of_n import OnlineDpoConfig, RejectionConfig
    from align.config.stages.policy_gradient import GrpoConfig, PpoConfig, RlooConfig
    from align.rl.trainers import BestOfNTrainer, GRPOTrainer, OnlineDPOTrainer, PPOTrainer, RLOOTrainer

CONFIGS = {
    "GrpoConfig": "policy_gradient",
    "OnlineDpoConfig": "best_of_n",
    "PpoConfig": "policy_gradient",
    "RejectionConfig": "best_of_n",
    "RlooConfig": "policy_gradient",
}
"""Class of settings -> its module below ``align.config.stages``."""

__all__ = [
    "BestOfNTrainer",
    "GRPOTrainer",
    "GrpoConfig",
    "OnlineDPOTrainer",
    "OnlineDpoConfig",
    "PPOTrainer",
    "PpoConfig",
    "RLOOTrainer",
    "RejectionConfig",
    "RlooConfig",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"align.config.stages.{CONFIGS[name]}" if name in CONFIGS else "align.rl.trainers"
    return getattr(importlib.import_module(module), name)
