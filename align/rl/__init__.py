"""Trainers that learn from their own rollouts: ``from align.rl import PPOConfig, PPOTrainer``.

PPO has a critic; GRPO and its variants, RLOO, online DPO and best-of-N have none. All are transformers' Trainers.
Names are imported on first use, so that importing a module of this package never loads torch by accident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.rl.critic_free.best_of_n import BestOfNTrainer
    from align.rl.critic_free.config import BestOfNConfig, GRPOConfig, OnlineDPOConfig, RLOOConfig
    from align.rl.critic_free.groups import GRPOTrainer, RLOOTrainer
    from align.rl.critic_free.pairs import OnlineDPOTrainer
    from align.rl.ppo.config import PPOConfig
    from align.rl.ppo.trainer import PPOTrainer

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

_MODULES = {
    **dict.fromkeys(("BestOfNConfig", "GRPOConfig", "OnlineDPOConfig", "RLOOConfig"), "align.rl.critic_free.config"),
    **dict.fromkeys(("GRPOTrainer", "RLOOTrainer"), "align.rl.critic_free.groups"),
    "OnlineDPOTrainer": "align.rl.critic_free.pairs",
    "BestOfNTrainer": "align.rl.critic_free.best_of_n",
    "PPOConfig": "align.rl.ppo.config",
    "PPOTrainer": "align.rl.ppo.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
