"""Stop a training loop on request: a checkpoint after the current step, then ``Stopped``.

With several processes all of them stop after the same step.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.pipeline.context import StageContext
from align.pipeline.stop_signal import CAN_STOP, Stopped, is_stop_requested


class StopOnRequest(TrainerCallback):
    """The last callback of a trainer; only checkpoints at multiples of ``every`` steps can be resumed."""

    def __init__(self, context: StageContext, every: int = 1) -> None:
        self.context, self.every, self.is_stopping = context, every, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
