"""Run stage ``rloo``: REINFORCE with the mean of the other responses to the prompt as baseline (arXiv 2402.14740)."""

from __future__ import annotations

from typing import Any

from align.pipeline.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return the metrics of ``ppo`` without a critic's. Resumes."""
    from align.rl.trainers import RLOOTrainer
    from align.stages.rl import train

    return train(context, RLOOTrainer)
