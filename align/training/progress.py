"""Write a trainer's progress, curves and held-out scores to the stage's events."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.errors import UserError
from align.pipeline.context import StageContext
from align.training.stopping import VALIDATION

HIDDEN = ("total_flos", "epoch", "num_tokens", "num_input_tokens_seen", "train_runtime", "train_tokens_per_second")
"""Values in trl's logs that are not shown as curves."""


def explain_no_learning(history: Sequence[Mapping[str, float]], warmup_ratio: float) -> str | None:
    """Return why a run has trained nothing if its learning rate was 0 in every logged step; None if it was not."""
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    if not rates or any(rates):
        return None
    steps = "its only step" if len(rates) == 1 else f"all {len(rates)} steps"
    text = f"the learning rate was 0 in {steps}"
    if warmup_ratio:
        return f"{text}, of the warm-up. Train for more steps, or set `warmup_ratio: 0` (now {warmup_ratio:g})"
    return f"{text}. Train for more steps, or use another scheduler"


def no_learning(context: StageContext, history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return ``untrained``, why a stage has trained nothing, and warn of it; empty if it has learned."""
    reason = explain_no_learning(history, context.config.warmup_ratio)
    if reason is None:
        return {}
    context.warn(f"{context.name}: nothing was learned: {reason}.")
    return {"untrained": reason}


def report_scores(context: StageContext, step: int, scores: Mapping[str, float]) -> None:
    """Log a point of the held-out curves; names without the validation prefix get ``test_``."""
    names = {name: name if name.startswith(VALIDATION) else f"test_{name}" for name in scores}
    context.log(step, **{names[name]: value for name, value in scores.items()})


class ReportLogs(TrainerCallback):
    """Passes what the trainer logs to ``report``, in the first of its processes."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report ``logs``, unless it is empty."""
        if state.is_world_process_zero and logs:
            self.report(args, state, logs)

    def report(self, args: TrainingArguments, state: TrainerState, logs: Mapping[str, float]) -> None:
        """Report the values of a step, an evaluation or the entire run."""
        raise NotImplementedError


class ReportProgress(ReportLogs):
    """Logs progress and a point of the curves per optimizer step; a loss that is not finite stops the stage.

    ``held_out`` scores the held-out rows (``align.training.held_out``) every ``eval_steps`` steps. ``scores_last`` does
    so after the last step as well, for scores that decide which weights are kept: the checkpoint of that step must have
    them, since a stage may continue from it.
    """

    def __init__(
        self,
        context: StageContext,
        held_out: Callable[[], dict[str, float]] | None = None,
        eval_steps: int | None = None,
        scores_last: bool = False,
    ) -> None:
        self.context = context
        self.held_out = held_out
        self.eval_steps = eval_steps
        self.scores_last = scores_last

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report the steps that are to come; rates count from here, so the first step is part of them."""
        if state.is_world_process_zero:
            self.context.progress(state.global_step, state.max_steps, tokens=int(state.num_input_tokens_seen))

    def report(self, args: TrainingArguments, state: TrainerState, logs: Mapping[str, float]) -> None:
        """Report a step; ``logs`` has ``loss`` after a step, and only totals of the run at its end."""
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.context.log(state.global_step, **{name: float(v) for name, v in logs.items() if name not in HIDDEN})
        shown: dict[str, Any] = {
            name.rpartition("/")[2]: float(logs[name]) for name in ("accuracy", "rewards/accuracies") if name in logs
        }
        self.context.progress(
            state.global_step,
            state.max_steps,
            tokens=int(state.num_input_tokens_seen),
            loss=loss,
            learning_rate=float(logs.get("learning_rate", 0.0)),
            **shown,
        )
        # Raise after logging, so the curves show the step at which the loss diverged.
        if not math.isfinite(loss):
            raise UserError(
                f"{self.context.name}: the training loss is {loss} at step {state.global_step}. "
                f"Lower learning_rate (now {args.learning_rate:g}) or max_grad_norm (now {args.max_grad_norm:g}), "
                "or raise warmup_ratio."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.held_out is not None and self.eval_steps is not None and state.global_step % self.eval_steps == 0
        # Scores of the last step on the test rows are the stage's result; ``fit`` computes them after training.
        if due and self.held_out is not None and (self.scores_last or state.global_step < state.max_steps):
            report_scores(self.context, state.global_step, self.held_out())
