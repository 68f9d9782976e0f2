"""A Trainer with a sharded model (``align.models.checkpoints.sharding``): no second wrapper, and full checkpoints.

Checkpoints have the format of one process, so a run resumes in any number of processes, sharded or not.
``RLTrainer`` calls the functions. Supervised trainers have the loop of transformers, so ``ShardingTrainer`` calls the
functions from there; ``align.patches.trainer`` lists the private methods that it overrides.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from align.config.runtime.launch import LaunchConfig, world_size
from align.models.checkpoints.sharding import full_model, full_tensor, is_sharded, local_shard, reshard, shard
from align.models.compute.precision import disable_autocast_cache
from align.training import zero


def shard_model(trainer: Any) -> None:
    """Shard the model if the strategy requires it; call it after ``__init__``, before the optimizer is created."""
    accelerator = trainer.accelerator
    args = trainer.args
    if args.gradient_checkpointing:
        disable_autocast_cache(accelerator)
    launch: LaunchConfig | None = getattr(args, "launch", None)
    if trainer.is_deepspeed_enabled:
        zero.unset_global_config()
        if args.precision == "bfloat16":  # outside the engine, as in scoring
            accelerator.autocast = functools.partial(torch.autocast, accelerator.device.type, torch.bfloat16)
    if launch is None or launch.strategy != "fsdp2" or world_size() == 1:
        return
    shard(trainer.model, launch.fsdp, accelerator.device)
    # accelerate would wrap it in DDP. In evaluation mode it adds autocast only.
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)


def prepare(trainer: Any, clip: Callable[[], None]) -> None:
    """Create optimizer and scheduler, and wrap the model for the launcher's strategy.

    DeepSpeed makes its steps within the backward pass, so it calls ``clip`` before each step.
    """
    args = trainer.args
    accelerator = trainer.accelerator
    accelerator.free_memory()
    trainer.lr_scheduler = None  # a second run has a schedule of other steps
    trainer.create_optimizer()
    trainer.parameter_groups = parameter_groups(trainer.optimizer)
    if trainer.is_deepspeed_enabled:
        trainer.optimizer, trainer.lr_scheduler = deepspeed_init(trainer, num_training_steps=args.max_steps)
    if trainer.model_wrapped is trainer.model:
        trainer.model_wrapped, trainer.optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
    else:  # an earlier run of the same trainer has wrapped it
        trainer.optimizer = accelerator.prepare(trainer.optimizer)
    trainer.create_scheduler(num_training_steps=args.max_steps)
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed = trainer.model_wrapped
        zero.clip_before_step(trainer.model_wrapped, clip)


def parameter_groups(optimizer: Any) -> zero.Groups:
    """Return the parameters of an optimizer's groups; DeepSpeed creates another optimizer and flattens them."""
    return [list(group["params"]) for group in optimizer.param_groups]


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Write the state of optimizer and scheduler; all processes gather a sharded state for it."""
    if trainer.is_deepspeed_enabled:
        step = int(trainer.state.global_step)
        state = zero.full_optimizer_state(trainer.parameter_groups, trainer.optimizer, step)
    else:
        state = trainer.optimizer.state_dict()
        if is_sharded(trainer.model):
            state = _gather_state(state)
    if trainer.args.should_save:
        torch.save(state, folder / OPTIMIZER_NAME)
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


@contextlib.contextmanager
def own_settings_kept(trainer: Any) -> Iterator[None]:
    """Return a context in which loading an optimizer's state leaves the settings of this run as they are.

    A stage that continues another may have other peak rates and another weight decay, which torch would replace by
    the state's.
    """
    optimizer = trainer.optimizer
    settings = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)  # accelerate's wrapper
    rates = list(scheduler.base_lrs) if isinstance(scheduler, LambdaLR) else None
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    if rates is not None:
        scheduler.base_lrs = rates


def load_optimizer(trainer: Any, folder: Path) -> None:
    """Restore optimizer and scheduler; every process reads the full state and keeps its own shards."""
    state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    with own_settings_kept(trainer):
        if trainer.is_deepspeed_enabled:
            # DeepSpeed trains separate float32 copies. Loading weights into the model does not change them.
            zero.sync_master_weights(trainer.parameter_groups)
            zero.load_optimizer_state(trainer.parameter_groups, trainer.optimizer, state)
        else:
            # Full tensors stay as they are if the model is not sharded.
            trainer.optimizer.load_state_dict(_shard_state(state, trainer.optimizer))
        trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


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
    parameter_groups: zero.Groups
    _save: Any

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless no step is left, in which case transformers' own loop would run one step."""
        if int(self.state.global_step) >= int(self.state.max_steps) or self.control.should_training_stop:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer over this process's shards, which scoring may have left gathered."""
        reshard(self.model)
        return super().create_optimizer(model)  # type: ignore[misc]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[misc]
        self.create_optimizer()  # for its groups
        self.parameter_groups = parameter_groups(self.optimizer)
        # Resuming is done below: the engine must exist before full states can be loaded into it.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            load_optimizer(self, Path(resume_from_checkpoint))
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
        # transformers saves self.model, so the gathered copy replaces it during the save.
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
        if self._is_partitioned:
            save_optimizer(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # With several processes transformers loads to accelerate's device, and torch.load does not accept "cpu:0".
        if checkpoint is None:
            return
        if world_size() == 1 and not self._is_partitioned:
            with own_settings_kept(self):
                super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        else:
            load_optimizer(self, Path(checkpoint))

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
