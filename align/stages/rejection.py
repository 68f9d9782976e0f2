"""Run stage ``rejection``: best-of-N fine-tuning in rounds (RAFT, arXiv 2304.06767; ReST, 2308.08998)."""

from __future__ import annotations

from typing import Any

from align.pipeline.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return the metrics of ``ppo``, with the share selected. Resumes after a round."""
    from align.rl.trainers import BestOfNTrainer
    from align.stages.rl import train

    return train(context, BestOfNTrainer)
