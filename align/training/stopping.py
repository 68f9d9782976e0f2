"""Early stopping, the best weights instead of the last, and the stop on request.

Every checkpoint contains the best value and the best weights so far, so a resumed run stops and chooses as the
uninterrupted one. The criterion is the validation loss, or the metric of a task that is evaluated during training. The
weights before the first step are never restored. A stop on request writes a checkpoint after the current step; with
several processes all of them stop after the same step.
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
from align.models.checkpoints.sharding import full_tensor, load_weights, reshard
from align.models.compute.processes import wait_for_all
from align.pipeline.context import StageContext
from align.pipeline.stop_signal import CAN_STOP, Stopped, is_stop_requested
from align.store.json_files import write_text_atomically
from align.training.checkpoints import link

Scores = dict[str, float]
STATE = "stopping.json"
WEIGHTS = "best.safetensors"
VALIDATION = "validation_"
"""Prefix of scores on the validation rows."""
VALIDATION_LOSS = f"{VALIDATION}loss"


class BestSoFar(TrainerCallback):
    """Stops training when the criterion no longer improves, and keeps the weights with its best value.

    ``best_loss`` and ``best_step`` are the best so far; ``waited`` counts the evaluations since then, of which
    ``scored_step`` had the last. A criterion that is better if higher counts as a negative loss.
    """

    def __init__(self, context: StageContext, trainer: Any) -> None:
        config: TrainingFields = context.config
        self.stopping = config.early_stopping
        self.keep = config.keep == "best"
        self.criterion = VALIDATION_LOSS if config.best_metric is None else config.best_metric
        self.lower_is_better = True
        self.trainer = trainer
        self.folder = context.checkpoints
        self.log = context.note
        self.best_loss = float("inf")
        self.best_step = 0
        self.waited = 0
        self.stopped_at = 0
        self.scored_step = 0
        # Full training may unfreeze other weights later, so all of them are kept.
        every = isinstance(config.tuning, FullTuning)
        self.parameters = {name: p for name, p in trainer.model.named_parameters() if every or p.requires_grad}

    def watching(self, validation: Callable[[], Scores]) -> Callable[[], Scores]:
        """Wrap ``validation`` to record its loss; call it when the model has the weights that would be saved."""

        def scored() -> Scores:
            scores = validation()
            self.consider(scores[VALIDATION_LOSS], int(self.trainer.state.global_step))
            return scores

        return scored

    def consider(self, value: float, step: int) -> None:
        """Compare the criterion after ``step`` steps with the best so far; keep the weights if it is better."""
        loss = value if self.lower_is_better else -value
        self.scored_step = step
        least = self.stopping.min_improvement if self.stopping is not None else 0.0
        # The first evaluation always counts as the best so far.
        if loss < self.best_loss - least or self.best_step == 0:
            self.best_loss = loss
            self.best_step = step
            self.waited = 0
            if self.keep:
                self._write()
        else:
            self.waited += 1
        if self.stopping is not None and self.waited >= self.stopping.patience and not self.stopped_at:
            self.stopped_at = step

    def _write(self) -> None:
        reshard(self.trainer.model)
        weights = {name: full_tensor(p.detach()).cpu().contiguous() for name, p in self.parameters.items()}
        if not self.trainer.is_world_process_zero():
            return
        # Write a draft and rename it, so the file is always complete.
        draft = self.folder / f"{WEIGHTS}.draft"
        draft.unlink(missing_ok=True)  # checkpoints hard-link the old file, so it must not be overwritten
        save_file(weights, draft)
        draft.rename(self.folder / WEIGHTS)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Load the state of the checkpoint that training resumes from."""
        if state.global_step == 0:
            return
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        saved = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if saved.get("criterion", VALIDATION_LOSS) != self.criterion:
            return  # the stage that this stage continues chose by other numbers
        self.best_step = saved["best_step"]
        self.waited = saved["waited"]
        self.scored_step = saved["scored_step"]
        self.best_loss = float("inf") if saved["best_loss"] is None else saved["best_loss"]
        if self.keep and self.best_step and state.is_world_process_zero:
            # The file in the folder may come from a later step, which the kill threw away.
            link(checkpoint / WEIGHTS, self.folder / WEIGHTS)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped_at:
            # No checkpoint of this step: resuming from it, transformers would run one more step before it stops. A run
            # that resumes from the checkpoint before stops here again.
            control.should_training_stop = True
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            state_to_save = {
                "criterion": self.criterion,
                "best_loss": self.best_loss if self.best_step else None,
                "best_step": self.best_step,
                "waited": self.waited,
                "scored_step": self.scored_step,
            }
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_text_atomically(checkpoint / STATE, json.dumps(state_to_save))
            # MarkCheckpoints runs after this callback, so the marker has the digests of both files.
            if self.keep and self.best_step:
                link(self.folder / WEIGHTS, checkpoint / WEIGHTS)

    @torch.no_grad()
    def restore(self) -> bool:
        """Load the best weights after training has ended. Return False if the last weights are the best."""
        last = int(self.trainer.state.global_step)
        if self.stopped_at and self.stopped_at == last:
            name = self.criterion if self.criterion != VALIDATION_LOSS else "validation loss"
            best = "lowest" if self.lower_is_better else "highest"
            self.log(f"stopped at step {last}: the {name} was {best} at step {self.best_step}")
        if not self.keep or self.best_step == last:
            return False
        wait_for_all()
        load_weights(self.trainer.model, load_file(self.folder / WEIGHTS))
        return True

    def facts(self) -> dict[str, Any]:
        """Return the stage's metrics."""
        return {
            "best_step": self.best_step,
            f"best_{self.criterion}": self.best_loss if self.lower_is_better else -self.best_loss,
            "stopped_early": bool(self.stopped_at),
        }


def wait_again(checkpoint: Path, changed: frozenset[str]) -> None:
    """Count the evaluations without an improvement from 0 in a checkpoint of a stage that may have stopped early.

    The settings in ``changed`` are other ones from there on, so the earlier evaluations tell nothing about them.
    """
    file = checkpoint / STATE
    if changed and file.is_file():
        state = json.loads(file.read_text(encoding="utf-8"))
        write_text_atomically(file, json.dumps({**state, "waited": 0}))


def best_so_far(context: StageContext, trainer: Any) -> BestSoFar | None:
    """Return the callback if the stage's config requires it."""
    config: TrainingFields = context.config
    return BestSoFar(context, trainer) if config.chooses else None


class EndAfter(TrainerCallback):
    """Ends training after ``step`` with a checkpoint, for a stage that another stage continues there.

    Add it before ``StopOnRequest``, which leaves a run alone that ends anyway.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End at once if training begins with the checkpoint of that step."""
        control.should_training_stop = state.global_step >= self.step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


class StopOnRequest(TrainerCallback):
    """The last callback of a trainer; only checkpoints at multiples of ``every`` steps can be resumed."""

    def __init__(self, context: StageContext, every: int = 1) -> None:
        self.context = context
        self.every = every
        self.is_stopping = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell the runner that a request is answered from now on."""
        self.context.emit(CAN_STOP)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_requested = is_stop_requested(self.context.events.parent)
        # All processes are at the same step, so either all of them enter the reduction or none does.
        if state.global_step % self.every or not _any_process(is_requested, args):
            return
        if control.should_training_stop:  # training ends here anyway, so finish the stage
            return
        self.is_stopping = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise ``Stopped``, which skips the held-out scores and the stage's result."""
        if not self.is_stopping:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # the launcher ends all processes with the first, so wait until all have saved
        raise Stopped(f"stopped as asked, at step {state.global_step} of {state.max_steps}.")


def _any_process(requested: bool, args: TrainingArguments) -> bool:
    """Return True in all processes if any process has seen the request."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return requested
    # The maximum over processes is 1 once any process has seen the request.
    flag = torch.tensor(int(requested), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
