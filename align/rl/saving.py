"""Checkpoints of a trainer that samples: atomic, with the trained tensors alone and the trainer's own state.

``checkpoint.py`` describes what a checkpoint holds.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.models.sharding import full_model
from align.models.tuning.apply import save_tuned
from align.rl import checkpoint

if TYPE_CHECKING:
    from transformers import Trainer

    Base = Trainer
else:
    Base = object


class AtomicCheckpoints(Base):
    """Mixed in before a Trainer: its checkpoints appear by one rename, and hold the state that it returns."""

    model: Any
    _draft: Path | None = None
    """Folder that a checkpoint is being written to."""

    @abstractmethod
    def state_to_save(self) -> dict[str, Any]:
        """Return JSON-able state for ``ppo_state.json``. Its ``fingerprint`` must be equal on loading."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_to_save`` returned."""

    @abstractmethod
    def save_extra_files(self, folder: Path) -> None:
        """Add files to a checkpoint before it is marked complete; called by the process that writes it."""

    @abstractmethod
    def load_extra_files(self, folder: Path) -> None:
        """Load what ``save_extra_files`` wrote; called after ``load_state``."""

    @abstractmethod
    def after_saving(self) -> None:
        """Clean up; called by the process that wrote a checkpoint, once it is in its place."""

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._draft or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write a checkpoint under another name and rename it: at any moment it is complete or not there."""
        output_dir = Path(super()._get_output_dir(trial))
        # The Trainer asks ``_get_output_dir`` for its folder, which is the draft until this is done.
        self._draft = output_dir / checkpoint.DRAFT
        checkpoint.clear(self._draft, self.accelerator)
        try:
            # The Trainer calls save_model, then writes optimizer, random states and trainer_state.json.
            super()._save_checkpoint(model, trial)
        finally:
            draft, self._draft = self._draft, None
        # Each process writes its own random state. The checkpoint is complete once all of them have.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.publish(draft, output_dir, self.args.save_total_limit)
            self.after_saving()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy, LoRA merged, as an ordinary model folder; inside a checkpoint, all trained tensors."""
        folder = Path(output_dir or str(self.args.output_dir))
        with full_model(self.model) as model:  # all processes gather a sharded model, one writes it
            if not self.args.should_save:
                return
            if not _internal_call:
                save_tuned(model.policy, self.processing_class, folder)
                return
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_trained(model, folder)
            checkpoint.save_state(folder, self.state_to_save())
            self.save_extra_files(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        # One process hashes the files. All processes read the weights.
        if self.args.should_save:
            checkpoint.check_files(folder)
        state = checkpoint.load_state(folder, self.state_to_save()["fingerprint"])
        with full_model(self.model, store=True) as plain:
            checkpoint.load_trained(plain, folder)
        self.load_state(state)
        if self.args.should_save:
            self.load_extra_files(folder)
