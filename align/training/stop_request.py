"""Stops a training loop that was asked to stop: a checkpoint after the step under way, then ``Stopped``.

With several processes all of them stop after the same step, whoever saw the request first.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.pipeline.context import StageContext
from align.pipeline.stop_signal import Stopped, is_stop_requested


class StopWhenAsked(TrainerCallback):
    """The last callback of a trainer. ``every``: a checkpoint can be resumed from at multiples of so many steps."""

    def __init__(self, context: StageContext, every: int = 1) -> None:
        self.context, self.every, self.stops = context, every, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every or not _agreed(is_stop_requested(self.context.events.parent), args):
            return
        if control.should_training_stop:  # it was the last step, or the method itself ends here: the result is near
            return
        self.stops = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise ``Stopped``: neither a last look at held-out rows nor the saving of a result is wanted now."""
        if not self.stops:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # the first process to end takes the others along: all of it must be saved
        raise Stopped(f"stopped as asked, at step {state.global_step} of {state.max_steps}.")


def _agreed(asked: bool, args: TrainingArguments) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return asked
    flag = torch.tensor(int(asked), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


__all__ = ["StopWhenAsked"]
