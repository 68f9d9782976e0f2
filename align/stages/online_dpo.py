"""Run stage ``online_dpo``: DPO on pairs of the policy's own responses, scored in each update (arXiv 2402.04792)."""

from __future__ import annotations

from typing import Any

from align.pipeline.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return the metrics of ``ppo``, with accuracy and margin of the pairs. Resumes."""
    from align.rl.trainers import OnlineDPOTrainer
    from align.stages.rl import train

    return train(context, OnlineDPOTrainer)
