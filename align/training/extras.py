"""What a stage's config adds to the training loop beside trl's loss: one list of callbacks, in the order they must run.

``fit`` adds them before its own, so that they see a step before the held-out rows are scored and a checkpoint before
it is marked complete. A callback may have ``facts()``, whose values become metrics of the stage.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from align.stage import StageContext
from align.training.unfreezing import schedule_layers
from align.tuning import FullTuning


def extra_callbacks(context: StageContext, trainer: Any) -> list[TrainerCallback]:
    """Callbacks for ``context.config``; called once, with the model as it came in and before a checkpoint is loaded."""
    tuning = context.config.tuning
    callbacks: list[TrainerCallback] = []
    if isinstance(tuning, FullTuning):
        trainer.layer_decay = tuning.layer_decay
        if tuning.scheduled:
            callbacks.append(schedule_layers(context, trainer, tuning))
    return callbacks
