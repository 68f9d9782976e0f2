"""Reports of an RL stage's updates: points of the curves, and progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from align.config.stages.rl import RolloutFields
from align.pipeline.context import StageContext
from align.training.progress import ReportLogs


def validation_split(config: RolloutFields) -> str:
    """Return the name of the split in metrics: prompts that select the policy are not from the ``test`` split."""
    return "test" if config.keep == "last" else "validation"


class ReportUpdates(ReportLogs):
    """Reports one point of the curves and one progress event per update."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the updates that are to come; rates count from here, so the first update is part of them."""
        if not state.is_world_process_zero:
            return
        config: RolloutFields = self.context.config
        finished_updates = state.global_step // config.steps_per_update
        tokens = [int(entry["tokens"]) for entry in state.log_history if "tokens" in entry]
        self.context.progress(finished_updates, config.updates, unit="updates", tokens=tokens[-1] if tokens else 0)

    def report(self, args: TrainingArguments, state: TrainerState, logs: Mapping[str, float]) -> None:
        """Report ``logs``: it has ``score`` after an update, ``eval_kl`` after a validation, else run totals."""
        if "eval_kl" in logs:
            split = validation_split(self.context.config)
            metrics = {name.replace("eval", split, 1): float(value) for name, value in logs.items() if "eval_" in name}
            self.context.log(int(logs["update"]), **metrics)
        if "score" not in logs:
            # Validations and the closing summary have no score, because they are not updates.
            return
        update = int(logs["update"])
        tokens = int(logs["tokens"])
        points = {name: float(value) for name, value in logs.items() if name not in ("update", "total_flos")}
        self.context.log(update, **points)
        shown = {name: float(logs[name]) for name in ("score", "gold", "kl") if name in logs}
        self.context.progress(update, self.context.config.updates, unit="updates", tokens=tokens, **shown)
