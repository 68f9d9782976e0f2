"""Checkpoints of ``RLTrainer``: atomic, with only the trained tensors and the trainer's own state.

``checkpoint.py`` describes what a checkpoint holds.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align.models.checkpoints.sharding import full_model
from align.models.tuning.apply import save_tuned
from align.rl import checkpoint
from align.rl.alarms import Alarm
from align.rl.sampler import drop_journals
from align.training import sharded
from align.training.checkpoints import link


def save_policy(trainer: Any, output_dir: str | None) -> None:
    """Save the policy, LoRA merged, as an ordinary model folder; by default to the run's ``output_dir``."""
    with full_model(trainer.model) as model:  # all processes gather a sharded model, one writes it
        if trainer.args.should_save:
            save_tuned(model.policy, trainer.processing_class, Path(output_dir or str(trainer.args.output_dir)))


def save_checkpoint(trainer: Any) -> None:
    """Write a checkpoint under another name and rename it: at any moment it is complete or not there."""
    args = trainer.args
    output_dir = Path(str(args.output_dir))
    draft = output_dir / checkpoint.DRAFT
    checkpoint.clear(draft, trainer.accelerator)
    folder = draft / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    with full_model(trainer.model) as model:  # all processes gather a sharded model, one writes it
        if args.should_save:
            folder.mkdir()
            checkpoint.save_trained(model, folder)
            checkpoint.save_state(folder, _state_to_save(trainer))
            _save_best(trainer, folder)
    # Each process writes its own random state into the folder that the first one made.
    trainer.accelerator.wait_for_everyone()
    sharded.save_optimizer(trainer, folder)
    checkpoint.save_random_state(folder)
    if args.should_save:
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    # The checkpoint is complete once all processes have written.
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        checkpoint.publish(draft, output_dir, args.save_total_limit)
        # The journals of episodes that were learned from, and former best policies, are not needed any more.
        drop_journals(output_dir, trainer.update)
        if trainer.validation is not None:
            trainer.validation.tidy()


def load_checkpoint(trainer: Any, folder: Path) -> None:
    """Continue from a checkpoint. Raises ``UserError`` if it is damaged, or of a run with another order of the data."""
    # One process hashes the files. All processes read the weights.
    if trainer.args.should_save:
        checkpoint.check_files(folder)
    state = checkpoint.load_state(folder, trainer.args.fingerprint())
    with full_model(trainer.model, store=True) as model:
        checkpoint.load_trained(model, folder)
    sharded.load_optimizer(trainer, folder)
    _load_state(trainer, state)
    if trainer.args.should_save:
        _load_best(trainer, folder)


def _state_to_save(trainer: Any) -> dict[str, Any]:
    """Return KL controller, totals, alarms, score scale, best validation, prefetched rollouts, and fingerprint."""
    state: dict[str, Any] = {
        "kl": trainer.kl_controller.state_dict(),
        "totals": trainer.totals,
        "alarms": [asdict(alarm) for alarm in trainer.alarms],
        "stopped": trainer.stopped,
        "fingerprint": trainer.args.fingerprint(),
    }
    if trainer.objective.scale is not None:
        state["scale"] = trainer.objective.scale.state_dict()
    if trainer.args.drift.max_staleness:
        # Older weights sampled these rollouts. A resumed run has no copy of them to sample from again.
        state["ahead"] = trainer.prefetcher.state_dict()
    if trainer.validation is not None:
        state["best"] = trainer.validation.best
    return state


def _load_state(trainer: Any, state: dict[str, Any]) -> None:
    trainer.kl_controller.load_state_dict(state["kl"])
    # The run before may have neither scaled scores nor validated.
    if trainer.objective.scale is not None and "scale" in state:
        trainer.objective.scale.load_state_dict(state["scale"])
    if trainer.validation is not None:
        trainer.validation.best = state.get("best")
    trainer.totals = state["totals"]
    trainer.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
    trainer.stopped = state["stopped"]
    trainer.prefetcher.load_state_dict(state.get("ahead", []), trainer.sampler.restore)


def _save_best(trainer: Any, folder: Path) -> None:
    """Add the weights of the best policy so far to a checkpoint."""
    if trainer.validation is not None and trainer.validation.weights is not None:
        # A link: the checkpoint keeps these weights when tidy deletes the folder of a former best policy.
        link(trainer.validation.weights, folder / checkpoint.BEST)


def _load_best(trainer: Any, folder: Path) -> None:
    """Restore the weights of the best policy so far."""
    if trainer.validation is not None and trainer.validation.weights is not None:
        # tidy may have deleted the folder, if a later checkpoint that is now lost had a better policy.
        trainer.validation.weights.parent.mkdir(exist_ok=True)
        link(folder / checkpoint.BEST, trainer.validation.weights)
