"""Methods without a critic that learn from their own rollouts: GRPO and its variants, RLOO, online DPO, best-of-N.

``from align.online import GRPOConfig, GRPOTrainer``: transformers' Trainers, used as ``align.ppo.PPOTrainer`` is. Names
are imported on first use, so that importing a module of this package never loads torch by accident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.online.best_of_n import BestOfNTrainer
    from align.online.config import BestOfNConfig, GRPOConfig, OnlineDPOConfig, RLOOConfig
    from align.online.groups import GRPOTrainer, RLOOTrainer
    from align.online.pairs import OnlineDPOTrainer

__all__ = [
    "BestOfNConfig",
    "BestOfNTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
]

_HOMES = {
    **dict.fromkeys(("BestOfNConfig", "GRPOConfig", "OnlineDPOConfig", "RLOOConfig"), "align.online.config"),
    **dict.fromkeys(("GRPOTrainer", "RLOOTrainer"), "align.online.groups"),
    "OnlineDPOTrainer": "align.online.pairs",
    "BestOfNTrainer": "align.online.best_of_n",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
