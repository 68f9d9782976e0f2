"""The Trainer's side of a model in parts (``align.models.sharding``): no second wrapping, whole checkpoints.

What is private in transformers and accelerate is overridden here alone (``tests/training/test_distributed.py``).
Checkpoints are those of one process, whole, so that a run resumes in any number of processes, sharded or not.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from align.launch import LaunchConfig, world_size
from align.models.precision import forget_copies
from align.models.sharding import forget_gathered, full, is_sharded, part, shard, whole


class ShardingTrainer:
    """Mixed in before a Trainer whose ``args.launch`` may ask for parts; ``share_out`` is called once it is built."""

    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any

    def share_out(self) -> None:
        """Shard the model where that is the strategy; before an optimizer is made."""
        if self.args.gradient_checkpointing:
            forget_copies(self.accelerator)
        launch: LaunchConfig | None = getattr(self.args, "launch", None)
        if launch is None or launch.strategy != "fsdp2" or world_size() == 1:
            return
        shard(self.model, launch.fsdp, self.accelerator.device)
        # accelerate would put DDP around it; for a model that is only evaluated it adds autocast and wraps nothing.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: Any = None) -> Any:
        """Of this process's part, whatever was scored before."""
        forget_gathered(self.model)
        return super().create_optimizer(model)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ever; a sharded model is gathered for it by all processes."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        sharded = self.model
        with whole(sharded) as self.model:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        self.model = sharded

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        sharded = self.model
        with whole(sharded, store=True) as self.model:
            super()._load_from_checkpoint(resume_from_checkpoint)  # type: ignore[misc]
        self.model = sharded

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        state = self.optimizer.state_dict()
        state["state"] = {
            number: {name: full(value) if isinstance(value, torch.Tensor) else value for name, value in kept.items()}
            for number, kept in state["state"].items()
        }
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not is_sharded(self.model) or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        numbered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, kept in state["state"].items():
            like = numbered[number]
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.shape == like.shape:
                    kept[name] = part(value, like)
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        return full(norm) if isinstance(norm, torch.Tensor) else norm
