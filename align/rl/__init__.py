"""Trainers that learn from their own rollouts: ``from align.rl import PPOConfig, PPOTrainer``.

PPO has a critic; GRPO and its variants, RLOO, online DPO and best-of-N have none. All are transformers' Trainers.
Names are imported on first use, so that importing a module of this package never loads torch by accident.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.rl.arguments import BestOfNConfig, GRPOConfig, OnlineDPOConfig, PPOConfig, RLOOConfig
    from align.rl.trainers import BestOfNTrainer, GRPOTrainer, OnlineDPOTrainer, PPOTrainer, RLOOTrainer

__all__ = [
    "BestOfNConfig",
    "BestOfNTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "arguments" if name.endswith("Config") else "trainers"
    return getattr(importlib.import_module(f"align.rl.{module}"), name)
