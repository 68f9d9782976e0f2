"""Early stopping, and the best weights instead of the last: both by the loss on the validation rows.

What was best so far is in every checkpoint, the weights too, so that a resumed run stops and keeps where the
uninterrupted one does. Left out: other metrics than the loss, and the weights before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config.stages.training import TrainingFields
from align.config.tuning import FullTuning
from align.models.processes import wait_for_all
from align.models.sharding import forget_gathered, full, put
from align.pipeline.context import StageContext
from align.training.checkpoints import link

Scores = dict[str, float]
STATE, WEIGHTS = "stopping.json", "best.safetensors"
VALIDATION = "validation_"
"""Before the names of scores on the validation rows."""
VALIDATION_LOSS = f"{VALIDATION}loss"


class BestSoFar(TrainerCallback):
    """Watches the validation loss: stops training when it no longer falls, and keeps the weights that had the lowest.

    ``best_loss`` and ``best_step`` are of the scorings so far, ``waited`` counts those since then that were no better.
    """

    def __init__(self, context: StageContext, trainer: Any) -> None:
        config: TrainingFields = context.config
        self.stopping, self.keep = config.early_stopping, config.keep == "best"
        self.trainer, self.folder, self.say = trainer, context.checkpoints, context.note
        self.best_loss, self.best_step, self.waited, self.stopped_at = float("inf"), 0, 0, 0
        # Which weights are open may change while a model is trained in full, so that all of them are kept.
        every = isinstance(config.tuning, FullTuning)
        self.parameters = {name: p for name, p in trainer.model.named_parameters() if every or p.requires_grad}

    def watching(self, validation: Callable[[], Scores]) -> Callable[[], Scores]:
        """``validation``, whose scores are noted; call it where the model has the weights that would be saved."""

        def scored() -> Scores:
            scores = validation()
            self._consider(scores[VALIDATION_LOSS], int(self.trainer.state.global_step))
            return scores

        return scored

    def _consider(self, loss: float, step: int) -> None:
        least = self.stopping.min_improvement if self.stopping is not None else 0.0
        if loss < self.best_loss - least or self.best_step == 0:
            self.best_loss, self.best_step, self.waited = loss, step, 0
            if self.keep:
                self._write()
        else:
            self.waited += 1
        if self.stopping is not None and self.waited >= self.stopping.patience and not self.stopped_at:
            self.stopped_at = step

    def _write(self) -> None:
        forget_gathered(self.trainer.model)
        kept = {name: full(p.detach()).cpu().contiguous() for name, p in self.parameters.items()}
        if not self.trainer.is_world_process_zero():
            return
        draft = self.folder / f"{WEIGHTS}.draft"
        draft.unlink(missing_ok=True)  # checkpoints share the file's content, so it is never written over
        save_file(kept, draft)
        draft.rename(self.folder / WEIGHTS)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what the checkpoint that is resumed from knew."""
        if state.global_step == 0:
            return
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        known = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        self.best_step, self.waited = known["best_step"], known["waited"]
        self.best_loss = float("inf") if known["best_loss"] is None else known["best_loss"]
        if self.keep and self.best_step and state.is_world_process_zero:
            link(checkpoint / WEIGHTS, self.folder / WEIGHTS)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped_at:
            # No checkpoint of this step: from one, transformers would take a step more before it heard of the stop. A
            # resumed run goes on from the one before and stops here again.
            control.should_training_stop, control.should_save = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            known = {
                "best_loss": self.best_loss if self.best_step else None,
                "best_step": self.best_step,
                "waited": self.waited,
            }
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            (checkpoint / STATE).write_text(json.dumps(known), encoding="utf-8")
            if self.keep and self.best_step:
                link(self.folder / WEIGHTS, checkpoint / WEIGHTS)

    @torch.no_grad()
    def restore(self) -> bool:
        """Give the model its best weights back, once training has ended; False where it has them."""
        last = int(self.trainer.state.global_step)
        if self.stopped_at and self.stopped_at == last:
            self.say(f"stopped at step {last}: the validation loss was lowest at step {self.best_step}")
        if not self.keep or self.best_step == last:
            return False
        wait_for_all()
        put(self.trainer.model, load_file(self.folder / WEIGHTS))
        return True

    def facts(self) -> dict[str, Any]:
        """For the stage's metrics."""
        return {
            "best_step": self.best_step,
            "best_validation_loss": self.best_loss,
            "stopped_early": bool(self.stopped_at),
        }


def best_so_far(context: StageContext, trainer: Any) -> BestSoFar | None:
    """The callback, where the stage's config asks for one."""
    config: TrainingFields = context.config
    return BestSoFar(context, trainer) if config.chooses else None
