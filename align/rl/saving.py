"""The Trainer's checkpoints as PPO needs them: whole or not there, the trained tensors alone, and PPO's own state.

What a checkpoint holds stands in ``checkpoint.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from transformers import Trainer

from align.models.sharding import whole
from align.models.tuning.apply import save_tuned
from align.rl import checkpoint
from align.training.sharded import ShardingTrainer


class SavingTrainer(ShardingTrainer, Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints appear by one rename; subclasses say what state they add."""

    model: Any
    _draft: Path | None = None

    @abstractmethod
    def state_to_save(self) -> dict[str, Any]:
        """JSON-able state for ``ppo_state.json``; the key ``fingerprint`` must be equal on loading."""

    @abstractmethod
    def take_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_to_save`` gave."""

    def save_extras(self, folder: Path) -> None:
        """Add files to a checkpoint, before it is marked; called by the process that writes it."""

    def load_extras(self, folder: Path) -> None:
        """Take them up again, once ``take_state`` has run."""

    def after_saving(self) -> None:
        """Called by the process that wrote a checkpoint, once it is in its place."""

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._draft or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write a checkpoint under another name and rename it: at any moment it is whole or not there."""
        output_dir = Path(super()._get_output_dir(trial))
        self._draft = output_dir / checkpoint.DRAFT
        checkpoint.clear(self._draft, self.accelerator)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            draft, self._draft = self._draft, None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.publish(draft, output_dir, self.args.save_total_limit)
            self.after_saving()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy, LoRA merged, as an ordinary model folder; inside a checkpoint, all that is trained."""
        folder = Path(output_dir or str(self.args.output_dir))
        with whole(self.model) as model:
            if not self.args.should_save:
                return
            if not _internal_call:
                save_tuned(model.policy, self.processing_class, folder)
                return
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_trained(model, folder)
            checkpoint.save_state(folder, self.state_to_save())
            self.save_extras(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.args.should_save:
            checkpoint.check_whole(folder)
        state = checkpoint.load_state(folder, self.state_to_save()["fingerprint"])
        with whole(self.model, store=True) as plain:
            checkpoint.load_trained(plain, folder)
        self.take_state(state)
        if self.args.should_save:
            self.load_extras(folder)
