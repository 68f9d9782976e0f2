"""Inputs of trainers that sample, refused if they or the launcher cannot work, and values that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.config.stages.rl import RolloutFields
from align.environments.player import EnvironmentPlayer
from align.errors import UserError
from align.rl.rollout import Rollout
from align.rl.sampler import require_some_episode
from align.rl.scores import AnyScorer, refuse_steps

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class RolloutInputs:
    """The trainers' arguments of these names."""

    train_dataset: Rows
    scorer: AnyScorer | None
    """None if only an environment scores."""
    engine: Any
    gold: AnyScorer | None = None
    eval_dataset: Rows | None = None
    ptx_dataset: Rows | None = None
    episodes: EnvironmentPlayer | None = None
    """Plays episodes in an environment, instead of single responses."""
    replay: Path | None = None
    """Folder of stored rollouts to learn from; ``engine`` may then be None."""


def refuse_rollout(rollout: Rollout, method: str, config: RolloutFields) -> None:
    """Raise ``UserError`` for a rollout from which a method cannot learn."""
    require_some_episode(rollout, method)
    refuse_steps(rollout, method, config.has_token_credit)


UNSUPPORTED = {
    "auto_find_batch_size": "set per_device_train_batch_size",
    "eval_on_start": "set eval_updates",
    "fp16": "set bf16",
    "load_best_model_at_end": "set keep",
    "neftune_noise_alpha": "the ratio of two passes would be noise",
    "push_to_hub": "upload the folder that save_model writes",
    "restore_callback_states_from_checkpoint": "pass callbacks in the state that they should have",
    "use_liger_kernel": "align has its own kernels",
}
"""Options of ``TrainingArguments`` that the loop does not have, with the remedy."""


def refuse_options(name: str, args: Any) -> None:
    """Raise ``UserError`` for options of ``TrainingArguments`` that the trainer of method ``name`` does not support."""
    for option, remedy in UNSUPPORTED.items():
        if getattr(args, option, None):
            raise UserError(f"{name}: the trainer does not support {option}: {remedy}.")


def refuse_plugins(trainer: Any) -> None:
    """Raise ``UserError`` for launchers of accelerate that the loop does not support."""
    name = trainer.objective.name
    if trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and not hasattr(trainer.args, "launch")):
        raise UserError(
            f"{name}: accelerate's FSDP and DeepSpeed plugins are not supported here. Run it as a stage with "
            "`runtime: {launch: {strategy: fsdp2}}`, or by DDP."
        )


def refuse_inputs(trainer: Any, inputs: RolloutInputs) -> None:
    """Raise ``UserError`` if the engine or the episodes cannot do what ``max_staleness`` and ``in_flight`` say."""
    if inputs.replay is not None:
        return
    name = trainer.objective.name
    args = trainer.args
    prefetcher = trainer.prefetcher
    staleness = args.drift.max_staleness
    if staleness and args.world_size > 1 and not prefetcher.shared_engine:
        raise UserError(
            f"{name}: max_staleness {staleness} in several processes needs servers: an engine in each process would "
            "sample while it learns. Set runtime.rollouts, or max_staleness 0."
        )
    if args.drift.in_flight != "continue":
        return
    problem = prefetcher.continuing_objection()
    if inputs.episodes is None:
        problem = "single responses have one turn. Pass `episodes`"
    if problem is not None:
        raise UserError(
            f"{name}: in_flight is continue, which lets servers load new weights between turns, but {problem}, or "
            "`in_flight='wait'`."
        )


def require_finite(trainer: Any, quantity: str, value: torch.Tensor) -> None:
    """Raise ``UserError`` with the update and the remedy if a loss or a gradient norm, a scalar, is not finite."""
    if bool(torch.isfinite(value)):
        return
    args = trainer.args
    rates = f"learning_rate (now {args.learning_rate:g})"
    if hasattr(trainer.model, "critic"):
        rates += ", critic_learning_rate"
    raise UserError(
        f"{trainer.objective.name}: update {trainer.update + 1} (optimizer step {trainer.state.global_step + 1}): the "
        f"{quantity} is {value.item()}. The last checkpoint is from before it. Lower {rates} or max_grad_norm "
        f"({args.max_grad_norm:g})."
    )
