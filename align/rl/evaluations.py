"""Validations and tasks during a run: measures of the policy that the engine holds, before it learns further."""

from __future__ import annotations

from typing import Any

from align.evaluation.training_tasks import LiveModel
from align.models.checkpoints.conversion import plain_of
from align.rl.update_steps import measure_passes
from align.training.held_out import scoring


def validate(trainer: Any, update: int) -> None:
    """Log how the policy does on held-out prompts after ``update`` updates. The engine must hold its weights."""
    assert trainer.validation is not None
    rollout = trainer.sampler.answer(trainer.validation.prompts)
    # For the KL to the reference: a policy that is too far from it does not count as the best.
    measure_passes(trainer, rollout, trainer.buffer.by_length(rollout))
    if trainer.is_world_process_zero():
        trainer.recorder.write_validation(rollout, update)
    trainer.log({**trainer.validation.run(rollout, update, trainer.model), "update": update})


def evaluate_tasks(trainer: Any, update: int, *, is_required: bool = False) -> bool:
    """Evaluate the policy after ``update`` updates on the stage's tasks. The engine must hold its weights.

    Returns False if the evaluation was skipped for its cost.
    """
    tasks = trainer.tasks
    name = trainer.config.best_metric
    assert tasks is not None

    def measure() -> dict[str, float]:
        with scoring(trainer):
            return dict(tasks.tasks.measure(LiveModel(plain_of(trainer.model.policy), trainer.engine)))

    scores = tasks.run(update, measure, is_required=is_required)
    if scores is not None and name is not None and trainer.best is not None:
        sign = -1 if tasks.tasks.better[name] == "lower" else 1
        trainer.best.consider(trainer.model, update, scores, name, sign)
    return scores is not None
