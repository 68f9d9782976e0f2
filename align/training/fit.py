"""Run a prepared trainer: held-out scores before and after, progress, checkpoints, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from align.config.launch import rank
from align.models.processes import agreed, gathered
from align.models.tuning.notice import notice, parameter_counts
from align.pipeline.context import StageContext
from align.training.checkpoints import MarkCheckpoints, last_complete
from align.training.clock import TrainingClock
from align.training.extras import extra_callbacks, has_scores, scored_with
from align.training.progress import ReportProgress, report_scores
from align.training.state_files import read_state, write_state
from align.training.stop_request import StopWhenAsked
from align.training.stopping import VALIDATION, best_so_far
from align.training.tracking import follow
from align.training.unfreezing import OpenLayers

Scores = dict[str, float]
HeldOut = Callable[[str], Scores]
"""Scores of the rows of a split, ``test`` or ``validation``, with the trainer's model as it is."""


def fit(trainer: Any, context: StageContext, held_out: HeldOut, before: bool = True) -> dict[str, Any]:
    """Train, or go on from the last complete checkpoint, and return the stage's metrics.

    ``held_out`` of the ``test`` split comes back as ``test_<name>_before`` (unless ``before`` is False) and
    ``test_<name>_after``. Where the config chooses a checkpoint, the ``validation`` split does so: it is scored on the
    way in place of the ``test`` split, which only what was chosen meets. ``tokens`` counts the real tokens of the whole
    run, ``training_seconds`` the time of its steps, those of earlier attempts included and those that a kill threw away
    left out; ``tokens_per_second`` is the one over the other.
    """

    def warn(text: str) -> None:
        context.warn(f"{context.name}: {text}")

    checkpoint = agreed(lambda: last_complete(context.checkpoints, warn))
    done = _step_of(checkpoint)
    with follow(context, trainer, done + 1 if checkpoint else 0):
        # What follows from the scores, such as when to stop, is to be the same in all processes.
        return _fit(trainer, context, lambda split: gathered(held_out(split))[0], before, checkpoint)


def _fit(
    trainer: Any, context: StageContext, held_out: HeldOut, before: bool, checkpoint: Path | None
) -> dict[str, Any]:
    extras = extra_callbacks(context, trainer)
    at_once = next((extra.most for extra in extras if isinstance(extra, OpenLayers)), None)
    context.note(notice(trainer.model, context.config.tuning, context.config.precision, at_once=at_once))
    first = scored_with(extras, partial(held_out, "test") if before else dict)
    at_first = _scored_before(context, first) if before or has_scores(extras) else {}
    for callback in extras:
        trainer.add_callback(callback)
    result, best = scored_with(extras, partial(held_out, "test")), best_so_far(context, trainer)
    on_the_way = result if best is None else scored_with(extras, best.watching(lambda: _named(held_out("validation"))))
    trainer.add_callback(ReportProgress(context, on_the_way, context.config.eval_steps))
    if best is not None:
        trainer.add_callback(best)  # after the scores, before the mark
        extras = [*extras, best]
    clock = TrainingClock(checkpoint)
    trainer.add_callback(clock)
    trainer.add_callback(MarkCheckpoints())
    trainer.add_callback(StopWhenAsked(context))  # after the mark
    if checkpoint is not None:
        print(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = clock.seconds()
    if best is not None:
        report_scores(context, trainer.state.global_step, on_the_way())
        best.restore()
    after = result()
    context.log(trainer.state.global_step, **{f"test_{name}": value for name, value in after.items()})
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = int(trainer.state.num_input_tokens_seen)
    timed = tokens if clock.knows_all else tokens - _tokens_in(checkpoint)
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "resumed_from_step": _step_of(checkpoint),
        "tokens": tokens,
        "training_seconds": seconds,
        "tokens_per_second": timed / seconds,
        **dict(zip(("trainable_parameters", "parameters"), parameter_counts(trainer.model), strict=True)),
        **({"loss_first": losses[0], "loss_last": losses[-1]} if losses else {}),
        **{name: value for extra in extras for name, value in getattr(extra, "facts", dict)().items()},
        **{f"test_{name}_before": value for name, value in at_first.items()},
        **{f"test_{name}_after": value for name, value in after.items()},
    }


def _named(scores: Scores) -> Scores:
    return {f"{VALIDATION}{name}": value for name, value in scores.items()}


def _scored_before(context: StageContext, held_out: Callable[[], Scores]) -> Scores:
    """Score the held-out rows before training; a resumed attempt reads what the first one wrote, unless it is damaged.

    The model still has the weights that it came in with: no checkpoint is loaded yet.
    """
    file = context.checkpoints / "before.json"
    known = agreed(lambda: read_state(file))
    if known is not None:
        return known
    scores = held_out()
    context.log(0, **{f"test_{name}": value for name, value in scores.items()})
    if rank() == 0:
        write_state(file, scores)
    return scores


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


def _tokens_in(checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state.get("num_input_tokens_seen", 0))
