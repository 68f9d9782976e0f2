"""Run stage ``ppo``: the policy learns from responses it samples itself to earn higher scores; with a critic."""

from __future__ import annotations

from typing import Any

from align.pipeline.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return scores, KL, lengths, speeds and times of the run.

    Resumes from the last complete checkpoint. Raises ``UserError`` for prompts or models that do not fit, and
    ``ParityError`` when the engine and the trainer hold different models.
    """
    from align.rl.trainers import PPOTrainer
    from align.stages.rl import train

    return train(context, PPOTrainer)
