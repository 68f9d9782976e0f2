"""The parts of ``continue_from`` that need a trainer of rows: its order, its callbacks, and the state that it keeps."""

from __future__ import annotations

import json
from typing import Any

from transformers import TrainerCallback

from align.config.runtime.launch import rank
from align.config.stages.training import TrainingFields
from align.pipeline.context import StageContext
from align.training.arguments import decay_steps
from align.training.checkpoints import last_complete
from align.training.kept_state import (
    STABLE,
    KeepStable,
    OwnSettings,
    continue_order,
    is_too_large,
    keep_state,
)
from align.training.order import grouped_order
from align.training.row_history import Continuation, passed_rows
from align.training.unfreezing import steps_per_epoch


def continue_rows(context: StageContext, trainer: Any) -> Continuation | None:
    """Return the order of the trainer's rows if it continues with other rows; None for the plain order."""
    return continue_order(
        context,
        trainer.train_dataset,
        "rows",
        lambda first: _grouped(first, trainer),
        lambda steps: _position(trainer, steps),
    )


def _grouped(first: list[int], trainer: Any) -> list[int]:
    """Return rows shuffled and grouped by length, as in a pass."""
    all_lengths = getattr(trainer, "row_lengths", None)
    lengths = [1 if all_lengths is None else all_lengths[row] for row in first]
    size = int(getattr(trainer.args, "order_micro_batch", trainer.args.train_batch_size))
    return [first[index] for index in grouped_order(lengths, size, trainer.rows_per_step, trainer.args.seed, 0)]


def _position(trainer: Any, steps: int) -> int:
    """Return the position in the endless sequence of passes at which transformers continues after ``steps`` steps."""
    # The last step of a pass may have fewer rows, so whole passes are counted in rows.
    passes, rest = divmod(steps, steps_per_epoch(trainer))
    return passes * len(trainer.train_dataset) + rest * int(trainer.rows_per_step)


def continuing_callbacks(context: StageContext, trainer: Any) -> list[TrainerCallback]:
    """Return the callbacks for continuing another stage and for keeping the state before a decay."""
    config: TrainingFields = context.config
    callbacks: list[TrainerCallback] = []
    if config.continue_from is not None:
        callbacks.append(OwnSettings())
    if config.scheduler == "wsd" and context.runtime.keep_state is not False:
        steps = int(trainer.args.max_steps)
        callbacks.append(KeepStable(context, steps - decay_steps(config, steps)))
    return callbacks


def keep_trained_state(context: StageContext, trainer: Any) -> int:
    """Write ``state/`` of a trained stage from the first process, and return its bytes there."""
    if rank() or context.runtime.keep_state is False:
        return 0
    checkpoint = last_complete(context.checkpoints, context.warn)
    # With wsd the state before the decay is kept. A state that is too large was not kept, and keep_state() says so.
    if context.config.scheduler == "wsd" and not (checkpoint and is_too_large(context, checkpoint)):
        folder = context.checkpoints / STABLE
        checkpoint = folder if folder.is_dir() else None
    steps = 0
    if checkpoint is not None:
        steps = int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    return keep_state(
        context,
        checkpoint,
        steps=steps,
        warmup_steps=int(trainer.args.warmup_steps),
        rows=trainer.train_dataset,
        continuation=trainer.continuation,
        passed=lambda start: passed_rows(trainer._get_train_sampler(), start, _position(trainer, steps)),
    )
