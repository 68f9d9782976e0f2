"""Callbacks and loss terms that a stage's config adds to trl's training loop.

``fit`` adds the callbacks before its own. They see a step before the held-out rows are scored, and a checkpoint before
it is marked complete. A callback may have ``facts()``, which become metrics of the stage; ``scores()``, which join the
held-out scores; and ``scoring()``, a context in which the model has the weights that will be its result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from align.config.stages.training import TrainingFields
from align.config.tuning import FullTuning
from align.pipeline.context import StageContext
from align.training.anchoring import KLToStart, PullToStart
from align.training.averaging import AverageWeights
from align.training.replay import make_replay
from align.training.unfreezing import schedule_layers

Scores = dict[str, float]


def extra_callbacks(context: StageContext, trainer: Any) -> list[TrainerCallback]:
    """Create the callbacks of ``context.config``, once, from the initial model before a checkpoint is loaded."""
    config: TrainingFields = context.config
    tuning = config.tuning
    callbacks: list[TrainerCallback] = []
    if isinstance(tuning, FullTuning):
        # The trainer reads it when it creates the optimizer, which is later.
        trainer.layer_decay = tuning.layer_decay
        if tuning.scheduled:
            callbacks.append(schedule_layers(context, trainer, tuning))
    # After the schedule has frozen weights and before the first step: the anchor is the model as it is now.
    if config.anchor is not None and config.anchor.to == "l2":
        callbacks.append(PullToStart(trainer.model, config.anchor.weight))
    if config.anchor is not None and config.anchor.to == "kl":
        low = context.precision == "bfloat16"
        trainer.terms = [*trainer.terms, KLToStart(trainer, config.anchor.weight, low)]
    if config.replay is not None:
        replay = make_replay(context, trainer)
        callbacks.append(replay)
        if config.replay_fraction:
            trainer.terms = [*trainer.terms, replay]
    if config.ema is not None:
        callbacks.append(AverageWeights(trainer.model, config.ema))
    return callbacks


def has_scores(callbacks: Sequence[TrainerCallback]) -> bool:
    """Return True if a callback has its own scores."""
    return any(hasattr(callback, "scores") for callback in callbacks)


def scored_with(callbacks: Sequence[TrainerCallback], held_out: Callable[[], Scores]) -> Callable[[], Scores]:
    """Return a function that joins ``held_out`` with the callbacks' ``scores()``, under the resulting weights.

    Those weights are in the model inside the ``scoring()`` contexts of all callbacks.
    """

    def scored() -> Scores:
        # Enter every callback's context, for example to swap in averaged weights.
        with contextlib.ExitStack() as weights:
            for callback in callbacks:
                if hasattr(callback, "scoring"):
                    weights.enter_context(callback.scoring())
            scores = dict(held_out())
            for callback in callbacks:
                if hasattr(callback, "scores"):
                    scores |= callback.scores()
            return scores

    return scored
