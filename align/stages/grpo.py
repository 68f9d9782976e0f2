"""Run stage ``grpo``: responses to a prompt are compared with each other, without a critic; GRPO and its variants."""

from __future__ import annotations

from typing import Any

from align.pipeline.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return the metrics of ``ppo`` without a critic's. Resumes.

    Raises ``UserError`` for prompts or models that do not fit, and ``ParityError`` when the engine and the trainer
    hold different models.
    """
    from align.rl.trainers import GRPOTrainer
    from align.stages.rl import train

    return train(context, GRPOTrainer)
