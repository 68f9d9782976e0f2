"""What a stage that trains on rows leaves: its model, written by the first of its processes."""

from __future__ import annotations

from typing import Any

from align.config.launch import rank
from align.models.sharding import whole
from align.models.tuning.apply import save_tuned
from align.pipeline.context import StageContext


def save(context: StageContext, trainer: Any, tokenizer: Any) -> None:
    """Write what was trained to ``model/``; called by all processes."""
    with whole(trained_model(trainer)) as trained:
        if rank() == 0:
            save_tuned(trained, tokenizer, context.output / "model")


def trained_model(trainer: Any) -> Any:
    """The trainer's model without what trains it in parallel; ``whole`` has all weights of a sharded one."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
