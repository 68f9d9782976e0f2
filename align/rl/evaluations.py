"""Weights for the engine, and measures of the policy that it then holds: probes, tasks and validations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from align.config.runtime import Runtime
from align.evaluation.training_tasks import LiveModel
from align.inference.trainer_engine import policy_weights
from align.models.checkpoints.conversion import plain_of
from align.models.checkpoints.sharding import full_model
from align.models.compute.processes import RestingWeights
from align.rl.model import trunk_of
from align.rl.update_steps import measure_passes
from align.training.held_out import scoring


def rest_base(trainer: Any, runtime: Runtime, others: Sequence[Any] = ()) -> None:
    """Keep the trainer's frozen weights in the machine's memory while its engine is awake, if ``runtime`` says so.

    The engine sleeps, and the weights are back, when a model of the trainer computes, or a model of ``others``, which
    share some of the weights. Only vLLM on the trainer's GPU sleeps.
    """
    sleep_mode = getattr(trainer.engine, "sleep_mode", None)
    if "base" not in runtime.offload or sleep_mode is None or not sleep_mode.enabled:
        return
    resting = RestingWeights(trainer.model)
    sleep_mode.make_room = resting.leave

    def come_back(*_: Any) -> None:
        if resting.is_away:
            sleep_mode.sleep_all()
            resting.come_back()

    model = trainer.model
    critic = getattr(model, "critic", None)
    trunks = [trunk_of(each) for each in (model.policy, model.reference, *others) if each is not None]
    for trunk in [*trunks, *([] if critic is None or critic.trunk is None else [critic.trunk])]:
        trunk.register_forward_pre_hook(come_back)


def prepare_engine(trainer: Any, update: int) -> dict[str, float]:
    """Give the engine the policy's weights, then probe, evaluate and validate it if it is time; return the seconds.

    A pool that samples in the background writes the weights now, and its servers load them once the running rollouts
    are done.
    """
    started = time.perf_counter()
    # Sharded weights are gathered for the engine, and freed again when it has them.
    with full_model(trainer.model) as model:
        trainer.prefetcher.set_weights(update, policy_weights(model.policy))
        is_probing = trainer.probe.is_due(update)
        is_validating = trainer.validation is not None and update % int(trainer.config.eval_updates or 1) == 0
        is_evaluating = trainer.tasks is not None and trainer.tasks.is_due(update)
        if is_probing or is_validating or is_evaluating:
            trainer.prefetcher.wait()  # they ask the engine themselves, about these weights
        if is_probing:
            with trainer.accelerator.autocast():
                trainer.probe.run(model.policy)
        synchronized = time.perf_counter()
        if is_evaluating and evaluate_tasks(trainer, update):
            # Drop the prefixes that the engine has cached for the tasks: rollouts must not depend on them.
            trainer.prefetcher.set_weights(update, policy_weights(model.policy))
    if is_validating:
        validate(trainer, update)
    seconds = {"sync": synchronized - started}
    if trainer.validation is not None or trainer.tasks is not None:
        seconds["validating"] = time.perf_counter() - synchronized
    return seconds


def validate(trainer: Any, update: int) -> None:
    """Log how the policy does on held-out prompts after ``update`` updates. The engine must hold its weights."""
    assert trainer.validation is not None
    rollout = trainer.sampler.answer(trainer.validation.prompts)
    # For the KL to the reference: a policy that is too far from it does not count as the best.
    measure_passes(trainer, rollout, lambda: (trainer.buffer.by_length(rollout), []))
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
