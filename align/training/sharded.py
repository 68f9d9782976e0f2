"""The Trainer's side of a sharded model (``align.models.sharding``): no second wrapper, full checkpoints.

Private methods of transformers and accelerate are overridden in this module only;
``tests/training/test_distributed.py`` covers them. Checkpoints have the format of one process, so a run resumes in any
number of processes, sharded or not.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from align.config.launch import LaunchConfig, world_size
from align.models.precision import disable_autocast_cache
from align.models.sharding import full_model, full_tensor, is_sharded, local_shard, reshard, shard
from align.training import zero


class ShardingTrainer:
    """Mixin before a Trainer whose ``args.launch`` may require sharding; call ``shard_model`` after ``__init__``."""

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
    """True where ``clip_in_parts`` clips gradients before DeepSpeed's steps, in place of DeepSpeed."""

    def clip_in_parts(self) -> None:
        """Clip gradients before a step of DeepSpeed's engine."""

    @property
    def is_over(self) -> bool:
        """True when no step is left, as after resuming from the checkpoint of the last step."""
        return int(self.state.global_step) >= int(self.state.max_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch; nothing where training is over, in which case transformers' own loop would run one step."""
        if self.is_over:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def shard_model(self) -> None:
        """Shard the model where the strategy requires it; before the optimizer is created."""
        if self.args.gradient_checkpointing:
            disable_autocast_cache(self.accelerator)
        launch: LaunchConfig | None = getattr(self.args, "launch", None)
        if self.is_deepspeed_enabled:
            zero.unset_global_config()
            if self.args.precision == "bfloat16":  # outside the engine, as in scoring
                device = self.accelerator.device.type
                self.accelerator.autocast = functools.partial(torch.autocast, device, torch.bfloat16)
        if launch is None or launch.strategy != "fsdp2" or world_size() == 1:
            return
        shard(self.model, launch.fsdp, self.accelerator.device)
        # accelerate would wrap it in DDP. In evaluation mode it adds autocast only.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer over this process's shards, which scoring may have left gathered."""
        reshard(self.model)
        return super().create_optimizer(model)  # type: ignore[misc]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[misc]
        self.create_optimizer()  # for its groups: DeepSpeed creates another one and flattens them
        self._groups = [list(group["params"]) for group in self.optimizer.param_groups]
        # Resuming is done below: the engine must exist before full states can be loaded into it.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if self.clips_itself:
            zero.clip_before_step(self.model_wrapped, self.clip_in_parts)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            # DeepSpeed trains float32 copies of its own. Loading into the model does not change them.
            zero.sync_master_weights(self._groups)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    @property
    def _is_partitioned(self) -> bool:
        return is_sharded(self.model) or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does; all processes gather a sharded model for it."""
        if not self._is_partitioned:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        sharded = self.model
        # transformers saves self.model, so the gathered copy takes its place for the moment.
        with full_model(sharded) as self.model:
            if self.args.should_save:
                self._save(output_dir or self.args.output_dir)
        self.model = sharded

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_partitioned:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        sharded = self.model
        with full_model(sharded, store=True) as self.model:
            super()._load_from_checkpoint(resume_from_checkpoint, self.model)  # type: ignore[misc]
        self.model = sharded

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_partitioned:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        if self.is_deepspeed_enabled:
            state = zero.full_optimizer_state(self._groups, self.optimizer, int(self.state.global_step))
        else:
            state = _gather_state(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # With several processes transformers loads to accelerate's device, and torch.load does not accept "cpu:0".
        if checkpoint is None or (world_size() == 1 and not self._is_partitioned):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        # Every process reads the full state and keeps its own shards.
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if self.is_deepspeed_enabled:
            zero.load_optimizer_state(self._groups, self.optimizer, state)
        else:
            self.optimizer.load_state_dict(_shard_state(state, self.optimizer))  # unchanged where nothing is sharded
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        return full_tensor(norm) if isinstance(norm, torch.Tensor) else norm


def _gather_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with full tensors."""
    parameter_states = {
        number: {
            name: full_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": parameter_states}


def _shard_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Replace full tensors of a parameter's shape by this process's shards, in place."""
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        like = numbered[number]
        for name, value in values.items():
            # AdamW's averages have the parameter's shape and are sharded. Its step is a scalar and stays.
            if isinstance(value, torch.Tensor) and value.shape == like.shape:
                values[name] = local_shard(value, like)
    return state
