"""Trainers that learn from their own rollouts: ``from align.rl import PpoConfig, PPOTrainer``.

PPO has a critic; GRPO and its variants, RLOO, online DPO and best-of-N have none. All are transformers' Trainers. Names
are imported on first use, so importing a module of this package never loads torch by accident.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config.stages.grpo import GrpoConfig
    from align.config.stages.online_dpo import OnlineDpoConfig
    from align.config.stages.ppo import PpoConfig
    from align.config.stages.rejection import RejectionConfig
    from align.config.stages.rloo import RlooConfig
    from align.rl.trainers import BestOfNTrainer, GRPOTrainer, OnlineDPOTrainer, PPOTrainer, RLOOTrainer

CONFIGS = {
    "GrpoConfig": "grpo",
    "OnlineDpoConfig": "online_dpo",
    "PpoConfig": "ppo",
    "RejectionConfig": "rejection",
    "RlooConfig": "rloo",
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
