"""DeepSpeed's ZeRO under a Trainer: its configuration, whole checkpoints, whole models.

The engine is accelerate's and transformers' (``TrainingArguments(deepspeed=...)``). What it would write is partitions
that only the same number of processes can read; here the state of each parameter is gathered into what one process
writes, by DeepSpeed's own access to it. What is private is touched here alone (``tests/training/test_zero.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from align.config.launch import DeepspeedConfig


def zero_options(options: DeepspeedConfig, on_gpu: bool, bfloat16: bool) -> dict[str, Any]:
    """What of ``TrainingArguments`` DeepSpeed needs: float32 weights, products of the stage's precision."""
    if not on_gpu:
        _have_cpus_count()
    zero: dict[str, Any] = {"stage": options.stage}
    if options.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if options.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if bfloat16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {"deepspeed": config, "use_cpu": False, "bf16": False}


def _have_cpus_count() -> None:
    """Have accelerate see several processes with gloo where it is not told that it is on CPUs.

    Told so it would leave DeepSpeed aside without a word, which runs on CPUs as well.
    """
    os.environ["DS_ACCELERATOR"] = os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    def gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_CPU

    PartialState._prepare_backend = gloo


def forget_global_config() -> None:
    """Have models that are loaded from now on come whole: transformers would partition each while stage 3 is about."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


Groups = list[list[torch.nn.Parameter]]
"""Parameters of an optimizer's groups, as they were before DeepSpeed flattened them."""

MOMENTS = ("exp_avg", "exp_avg_sq")


def _link(optimizer: Any) -> None:
    """Have DeepSpeed find the state of each parameter, which it looked for before there was any."""
    zero = optimizer.optimizer
    flat = getattr(zero, "single_partition_of_fp32_groups", None)
    for partition in zero.fp32_partitioned_groups_flat if flat is None else flat:
        kept = zero.optimizer.state[partition]
        for name in MOMENTS:
            kept.setdefault(name, torch.zeros_like(partition))
        kept.setdefault("step", torch.zeros(()))
    if flat is not None:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def whole_state(groups: Groups, optimizer: Any, step: int) -> dict[str, Any]:
    """AdamW's state as one process writes it; called by all processes."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(optimizer)
    state: dict[int, dict[str, torch.Tensor]] = {}
    described = []
    for parameters, group in zip(groups, optimizer.param_groups, strict=True):
        numbers = range(len(state), len(state) + len(parameters))
        described.append({name: value for name, value in group.items() if name != "params"} | {"params": [*numbers]})
        for number, parameter in zip(numbers, parameters, strict=True):
            found = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            shape = getattr(parameter, "ds_shape", parameter.shape)
            state[number] = {name: value.detach().cpu().view(shape).clone() for name, value in found.items()}
            state[number]["step"] = torch.tensor(float(step))
    return {"state": state, "param_groups": described}


def take_state(groups: Groups, optimizer: Any, found: dict[str, Any]) -> None:
    """Go on from what ``whole_state``, or a process by itself, wrote; called by all processes."""
    from deepspeed.utils import safe_set_full_optimizer_state

    _link(optimizer)
    every = [parameter for parameters in groups for parameter in parameters]
    for number, kept in found["state"].items():
        for name in MOMENTS:
            safe_set_full_optimizer_state(every[number], kept[name].to(every[number].device), name)
    steps = [kept["step"] for kept in found["state"].values()]
    for kept in optimizer.optimizer.optimizer.state.values():
        if steps and "step" in kept:
            kept["step"] = torch.as_tensor(steps[0]).clone()
    for group, written in zip(optimizer.param_groups, found["param_groups"], strict=True):
        group.update({name: value for name, value in written.items() if name != "params"})


def take_weights(groups: Groups) -> None:
    """Have DeepSpeed's own copies of the weights follow what was read into the model."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter in (parameter for parameters in groups for parameter in parameters):
        partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter] if partitioned else []):
            value = parameter.detach().float().clone()
        safe_set_full_fp32_param(parameter, value)


def clip_by(engine: Any, do: Callable[[], None]) -> None:
    """Have ``do`` clip gradients instead of DeepSpeed: before each step, which follows a backward pass at once."""
    engine.optimizer.clip_grad = 0.0
    step = engine.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        do()
        return step(*args, **kwargs)

    engine.step = stepped


def clip_part(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients of some parameters down to ``max_norm``; returns their norm before. By all processes."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    gradients = [(p, grad) for p in parameters if (grad := safe_get_full_grad(p)) is not None]
    if not gradients:
        return torch.zeros(())
    norm: torch.Tensor = torch.stack([grad.norm() for _, grad in gradients]).norm()
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for parameter, grad in gradients:
            safe_set_full_grad(parameter, grad * scale)
    return norm
