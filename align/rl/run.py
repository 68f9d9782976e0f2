"""The start and the end of a run of ``RLTrainer``: state, optimizer, wrapped model, resume, and the closing metrics.

For a stage with ``continue_from``, also the order of its prompts and the state that it keeps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, speed_metrics

from align.config.runtime.launch import rank
from align.errors import UserError
from align.inference.trainer_engine import policy_weights
from align.models.checkpoints.sharding import full_model
from align.models.compute.processes import broadcast
from align.models.tuning.apply import parameter_counts
from align.pipeline.context import StageContext
from align.rl.alarms import count_alarms
from align.rl.checkpoint import last_checkpoint, load_checkpoint, load_random_state
from align.rl.clipping import clip_parts
from align.rl.evaluations import evaluate_tasks, validate
from align.rl.metrics import score_reasons
from align.rl.prompts import derive_seed
from align.rl.rollout import COMPONENT
from align.rl.sampler import drop_journals
from align.scoring.score import WeightedSum
from align.training import sharded
from align.training.kept_state import continue_order, keep_state
from align.training.progress import explain_no_learning
from align.training.row_history import Continuation

SUMMARIZED = (
    *("score", "gold", "kl", "length", "eos_rate", "entropy", "explained_variance", "parity_gap"),
    *("thought_length", "open_thoughts"),
    *("turns", "calls", "malformed_calls", "tool_errors", "max_turns_rate", "failure_rate"),
)
"""Metrics whose first and last values are metrics of the stage."""


def begin(trainer: Any, resume_from_checkpoint: str | bool | None) -> None:
    """Prepare a trainer for its first update, or for the update after a checkpoint."""
    args = trainer.args
    if trainer.config.evaluate is not None and trainer.tasks is None:
        raise UserError("evaluate needs a stage's artifacts, and this trainer has none: run the stage or leave it out.")
    checkpoint = _choose_checkpoint(trainer, resume_from_checkpoint)
    if checkpoint is None:
        _drop_older_journals(trainer)
        trainer.state = TrainerState(train_batch_size=args.per_device_train_batch_size)
        trainer.state.compute_steps(args, args.max_steps)
    else:
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    trainer.state.init_training_references(trainer, args.max_steps, 1, None)
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(**_checkpointing_options(args.gradient_checkpointing_kwargs))
    # 1. Wrap model and optimizer for the launcher. A checkpoint's state is loaded into the wrapped optimizer.
    sharded.prepare(trainer, clip=lambda: clip_parts(trainer))
    if checkpoint is not None:
        load_checkpoint(trainer, checkpoint)
    # 2. Delete the stored rollouts of updates after the checkpoint, because they are sampled again.
    if trainer.is_world_process_zero():
        trainer.recorder.rewind(trainer.update)
    # 3. Tell the callbacks what they may change, as the loop of transformers' Trainer does.
    handler = trainer.callback_handler
    for name in ("model", "optimizer", "lr_scheduler"):
        setattr(handler, name, getattr(trainer, name))
    trainer.model_wrapped.zero_grad()
    trainer.started = time.time()
    trainer.control = handler.on_train_begin(args, trainer.state, trainer.control)
    trainer.control = handler.on_epoch_begin(args, trainer.state, trainer.control)
    # 4. Restore the random states last, because the callbacks may have drawn numbers.
    if checkpoint is not None:
        load_random_state(checkpoint)


def end(trainer: Any) -> TrainOutput:
    """Log the metrics of the entire run, tell the callbacks that it is over, and validate the last policy."""
    args = trainer.args
    handler = trainer.callback_handler
    trainer.control = handler.on_epoch_end(args, trainer.state, trainer.control)
    trainer.save()
    responses = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    metrics = speed_metrics("train", trainer.started, num_samples=responses, num_steps=args.max_steps)
    metrics["train_loss"] = trainer.update_log.total_loss / max(trainer.state.global_step, 1)
    trainer.log(metrics)
    trainer.control = handler.on_train_end(args, trainer.state, trainer.control)
    repeated = [line for line in count_alarms(trainer.alarms) if ", again at " in line]
    if repeated and trainer.is_world_process_zero():
        trainer.notify(f"alarms that were raised again: {'; '.join(repeated)}")
    if trainer.alarm_stop is None and (trainer.validation is not None or trainer.tasks is not None):
        _validate_last(trainer)
    return TrainOutput(trainer.state.global_step, metrics["train_loss"], metrics)


def summarize(trainer: Any) -> dict[str, Any]:
    """Return metrics of the entire run. First and last values are means over a few updates, seconds are sums.

    ``trainable_parameters`` and ``parameters`` are the policy's, without critic and reference, so they are comparable
    with stages that have neither.
    """
    history = [entry for entry in trainer.state.log_history if "score" in entry]
    metrics: dict[str, Any] = {"updates": len(history), **trainer.totals}
    scorer = trainer.sampler.scorer
    if history:
        metrics |= _summarize_history(history, scorer.names if isinstance(scorer, WeightedSum) else [])
        metrics["tokens_per_second"] = trainer.totals["tokens"] / max(metrics["seconds"], 1e-9)
        untrained = explain_no_learning(history, trainer.config.warmup_ratio)
        if untrained is not None:
            trainer.notify(f"nothing was learned: {untrained}.")
            metrics["untrained"] = untrained
        reasons = score_reasons(trainer.config, history[-1])
        metrics |= {"score_reasons": reasons} if reasons else {}
    if trainer.best is not None and trainer.best.best is not None:
        metrics["kept"] = trainer.best.best
    if trainer.tasks is not None:
        metrics |= trainer.tasks.finish()
    if trainer.alarms:
        metrics["alarms"] = count_alarms(trainer.alarms)
    metrics |= trainer.memory.facts()
    metrics["trainable_parameters"], metrics["parameters"] = parameter_counts(trainer.model.policy)
    critic = getattr(trainer.model, "critic", None)
    if critic is not None:
        metrics["trainable_parameters_critic"] = parameter_counts(critic)[0]
    if trainer.stopped:
        metrics["stopped"] = trainer.stopped
    return metrics


def _summarize_history(history: list[dict[str, float]], reward_names: list[str]) -> dict[str, Any]:
    """Return first and last values, total seconds and peak memory of the updates' metrics."""
    metrics: dict[str, Any] = {}
    count = max(1, min(3, len(history) // 4))  # single updates are noisy
    rewards = [f"{COMPONENT}{name}" for name in reward_names]
    for name in (*SUMMARIZED, *rewards):
        if name in history[0]:
            # An update without thoughts lacks their metrics, which are then 0.
            metrics[f"{name}_first"] = sum(entry.get(name, 0.0) for entry in history[:count]) / count
            metrics[f"{name}_last"] = sum(entry.get(name, 0.0) for entry in history[-count:]) / count
    # If a stage continues another, maybe only the earlier or only the later stage validated.
    for name in dict.fromkeys(name for entry in history for name in entry if name.startswith("seconds")):
        metrics[name] = sum(entry.get(name, 0.0) for entry in history)
    metrics["kl_coef_last"] = history[-1]["kl_coef"]
    metrics["peak_memory_gib"] = max(entry["peak_memory_gib"] for entry in history)
    return metrics


def _validate_last(trainer: Any) -> None:
    """Validate and evaluate the last policy, unless that was done, and restore the best policy if ``keep`` says so."""
    validated_updates = [entry["update"] for entry in trainer.state.log_history if "eval_kl" in entry]
    is_validating = trainer.validation is not None and trainer.update not in validated_updates
    is_evaluating = trainer.tasks is not None and trainer.update not in trainer.tasks.scores
    if is_validating or is_evaluating:
        with full_model(trainer.model) as model:
            trainer.engine.load_weights(policy_weights(model.policy))
    if is_evaluating:
        evaluate_tasks(trainer, trainer.update, is_required=trainer.config.best_metric is not None)
    if is_validating:
        validate(trainer, trainer.update)
    if trainer.config.keep != "last":
        # The first process may still be writing the best weights that all processes read next.
        trainer.accelerator.wait_for_everyone()
        trainer.best.restore(trainer.model)


def _choose_checkpoint(trainer: Any, resume_from_checkpoint: str | bool | None) -> Path | None:
    if resume_from_checkpoint is True:
        # Only one process looks for it, because the search moves damaged checkpoints away.
        newest: Path | None = broadcast(lambda: last_checkpoint(Path(str(trainer.args.output_dir)), trainer.notify))
        return newest
    return Path(resume_from_checkpoint) if resume_from_checkpoint else None


def _drop_older_journals(trainer: Any) -> None:
    """Delete the journals in ``output_dir`` if they are another run's.

    They are another run's if this run could not continue from them: a run with a checkpoint would have resumed from it,
    and a run that does not save never resumes. Without a checkpoint it may be this run, killed early, which reads its
    journal.
    """
    folder = Path(str(trainer.args.output_dir))
    is_older = trainer.args.save_strategy == "no" or any(folder.glob("checkpoint-*"))
    if is_older and trainer.is_world_process_zero():
        drop_journals(folder)
    trainer.accelerator.wait_for_everyone()


def _checkpointing_options(options: Any) -> dict[str, Any]:
    """Return the arguments of ``gradient_checkpointing_enable``; two of the Trainer's options are separate there."""
    rest = dict(options or {})
    every_n_layers = rest.pop("every_n_layers", 1)
    offload = rest.pop("offload", False)
    return {"gradient_checkpointing_kwargs": rest or None, "every_n_layers": every_n_layers, "offload": offload}


def continue_prompts(context: StageContext, trainer: Any) -> Continuation | None:
    """Return the order of the prompts if a stage continues with other prompts; None for the plain order."""

    def shuffle(first: list[int]) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(trainer.args.seed, "new prompts"))
        return [first[index] for index in torch.randperm(len(first), generator=generator).tolist()]

    rows = [{"prompt": ids} for ids in trainer.prompts.token_ids]
    return continue_order(context, rows, "prompts", shuffle, lambda steps: _prompts_done(trainer, steps))


def keep_rollout_state(context: StageContext, trainer: Any) -> int:
    """Write ``state/`` of a trained stage from the first process, and return its bytes there."""
    if rank():
        return 0
    args = trainer.args
    prompts = trainer.prompts
    steps = int(trainer.state.global_step)

    def passed(start: int) -> list[int]:
        # After twice as many draws as there are prompts, all were drawn: first new prompts, then an epoch over all.
        numbers = range(start, min(_prompts_done(trainer, steps), start + len(prompts) * 2))
        numbers_of_rows: list[int] = prompts.next(numbers, args.seed)
        return numbers_of_rows

    return keep_state(
        context,
        last_checkpoint(context.checkpoints, trainer.notify),
        steps=steps,
        warmup_steps=int(args.get_warmup_steps(args.max_steps)),
        rows=[{"prompt": ids} for ids in prompts.token_ids],
        continuation=prompts.continuation,
        passed=passed,
    )


def _prompts_done(trainer: Any, steps: int) -> int:
    return int(steps // trainer.config.steps_per_update * trainer.config.prompts_per_update)
