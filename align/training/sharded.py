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

from align.config.launch import LaunchConfig, world_size
from align.models.precision import forget_copies
from align.models.sharding import forget_gathered, full, is_sharded, part, shard, whole
from align.training import zero


class ShardingTrainer:
    """Mixed in before a Trainer whose ``args.launch`` may ask for parts; ``share_out`` is called once it is built."""

    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    control: Any
    is_deepspeed_enabled: bool
    _groups: zero.Groups
    _save: Any

    clips_itself = False
    """Whether ``clip_in_parts`` clips gradients before a step of DeepSpeed's, which is else told to."""

    def clip_in_parts(self) -> None:
        """Called before a step of DeepSpeed's engine."""

    @property
    def is_over(self) -> bool:
        """True when no step is left, as where a run resumes from the checkpoint of its last step."""
        return int(self.state.global_step) >= int(self.state.max_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Make the steps of an epoch; none where training is over, while transformers' own loop always makes one."""
        if self.is_over:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def share_out(self) -> None:
        """Shard the model where that is the strategy; before an optimizer is made."""
        if self.args.gradient_checkpointing:
            forget_copies(self.accelerator)
        launch: LaunchConfig | None = getattr(self.args, "launch", None)
        if self.is_deepspeed_enabled:
            zero.forget_global_config()
            if self.args.precision == "bfloat16":  # where the engine is not asked, as in scoring
                device = self.accelerator.device.type
                self.accelerator.autocast = functools.partial(torch.autocast, device, torch.bfloat16)
        if launch is None or launch.strategy != "fsdp2" or world_size() == 1:
            return
        shard(self.model, launch.fsdp, self.accelerator.device)
        # accelerate would put DDP around it; for a model that is only evaluated it adds autocast and wraps nothing.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: Any = None) -> Any:
        """Of this process's part, whatever was scored before."""
        forget_gathered(self.model)
        return super().create_optimizer(model)  # type: ignore[misc]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[misc]
        self.create_optimizer()  # for its groups: DeepSpeed has another made, which it flattens
        self._groups = [list(group["params"]) for group in self.optimizer.param_groups]
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if self.clips_itself:
            zero.clip_by(self.model_wrapped, self.clip_in_parts)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            zero.take_weights(self._groups)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    @property
    def _in_parts(self) -> bool:
        return is_sharded(self.model) or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ever; a model in parts is gathered for it by all processes."""
        if not self._in_parts:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        held = self.model
        with whole(held) as self.model:
            if self.args.should_save:
                self._save(output_dir or self.args.output_dir)
        self.model = held

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._in_parts:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        held = self.model
        with whole(held, store=True) as self.model:
            super()._load_from_checkpoint(resume_from_checkpoint, self.model)  # type: ignore[misc]
        self.model = held

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._in_parts:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        if self.is_deepspeed_enabled:
            state = zero.whole_state(self._groups, self.optimizer, int(self.state.global_step))
        else:
            state = _gathered(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # With several processes transformers reads onto the device, and no file can be read onto accelerate's "cpu:0".
        if checkpoint is None or (world_size() == 1 and not self._in_parts):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if self.is_deepspeed_enabled:
            zero.take_state(self._groups, self.optimizer, state)
        else:
            self.optimizer.load_state_dict(_parted(state, self.optimizer))  # plain where nothing is in parts
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        return full(norm) if isinstance(norm, torch.Tensor) else norm


def _gathered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with whole tensors."""
    kept = {
        number: {name: full(value) if isinstance(value, torch.Tensor) else value for name, value in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": kept}


def _parted(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole state with this process's parts of what is as large as its parameter."""
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, own in state["state"].items():
        like = numbered[number]
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and value.shape == like.shape:
                own[name] = part(value, like)
    return state
