"""The parts of ``continue_from`` that need a trainer of rows: its order, its callbacks, and the state that it keeps."""

from __future__ import annotations

import json
import shutil
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config.runtime.launch import rank
from align.config.stages.training import TrainingFields
from align.pipeline.context import StageContext
from align.training.arguments import decay_steps
from align.training.checkpoints import last_complete, link
from align.training.kept_state import (
    STABLE,
    OwnSettings,
    continue_order,
    files_of,
    is_too_large,
    keep_state,
)
from align.training.order import grouped_order
from align.training.row_history import Continuation, passed_rows
from align.training.stopping import EndAfter
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
    order = grouped_order(lengths, trainer.row_group, trainer.rows_per_step, trainer.args.seed, 0)
    return [first[index] for index in order]


def _position(trainer: Any, steps: int) -> int:
    """Return the position in the endless sequence of passes at which transformers continues after ``steps`` steps."""
    # The last step of a pass may have fewer rows, so whole passes are counted in rows.
    passes, rest = divmod(steps, steps_per_epoch(trainer))
    return passes * len(trainer.train_dataset) + rest * int(trainer.rows_per_step)


class KeepStable(TrainerCallback):
    """Keeps the checkpoint of ``step``, the last before ``wsd`` lowers the learning rate."""

    def __init__(self, context: StageContext, step: int) -> None:
        self.context = context
        self.checkpoints = context.checkpoints
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Link the marked checkpoint, before the Trainer deletes it as too old."""
        self._keep(state)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the state if a kill prevented that before, or if the stage continues from exactly that step."""
        self._keep(state)

    def _keep(self, state: TrainerState) -> None:
        checkpoint = self.checkpoints / f"checkpoint-{self.step}"
        if state.global_step != self.step or not state.is_world_process_zero or not checkpoint.is_dir():
            return
        if is_too_large(self.context, checkpoint):
            return  # a third checkpoint would fill the disk for no use
        target = self.checkpoints / STABLE
        draft = self.checkpoints / f"{STABLE}.draft"
        for folder in (target, draft):
            shutil.rmtree(folder, ignore_errors=True)
        draft.mkdir()
        # The Trainer deletes old checkpoints. The links keep these files.
        for file in files_of(checkpoint):
            link(file, draft / file.name)
        draft.rename(target)


def continuing_callbacks(context: StageContext, trainer: Any) -> list[TrainerCallback]:
    """Return the callbacks for continuing another stage and for keeping the state before a decay."""
    config: TrainingFields = context.config
    callbacks: list[TrainerCallback] = []
    if config.continue_from is not None:
        callbacks.append(OwnSettings())
    if config.scheduler == "wsd" and context.runtime.keep_state is not False:
        steps = int(trainer.args.max_steps)
        callbacks.append(KeepStable(context, steps - decay_steps(config, steps)))
    if config.end_after is not None:
        callbacks.append(EndAfter(config.end_after))
    return callbacks


def keep_trained_state(context: StageContext, trainer: Any) -> int:
    """Write ``state/`` of a trained stage from the first process, and return its bytes there."""
    if rank() or context.runtime.keep_state is False:
        return 0
    checkpoint = last_complete(context.checkpoints, context.warn)
    # With wsd the state before the decay is kept. A state that is too large was not kept, and keep_state() says so.
    decays = context.config.scheduler == "wsd" and context.config.end_after is None
    if decays and not (checkpoint and is_too_large(context, checkpoint)):
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
