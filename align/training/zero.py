"""DeepSpeed's ZeRO with a Trainer: configuration, and full checkpoints that any number of processes can read.

The engine is started by accelerate and transformers (``TrainingArguments(deepspeed=...)``). Its own checkpoints are
partitions that only the same number of processes can read. Here each parameter's state is gathered through DeepSpeed's
API into the format of a single process. Private attributes are used in this module only;
``tests/training/test_zero.py`` covers them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from align.config.runtime.launch import DeepspeedConfig
from align.patches.accelerate import use_gloo_on_cpus
from align.patches.deepspeed import link_optimizer_states


def zero_options(options: DeepspeedConfig, on_gpu: bool, bfloat16: bool) -> dict[str, Any]:
    """Return DeepSpeed's fields of ``TrainingArguments``: float32 weights, matrix products of the stage's precision."""
    if not on_gpu:
        _allow_cpus()
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
        # The optimizer is torch's, as without DeepSpeed, which would otherwise refuse it, or replace it when
        # offloading.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if bfloat16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {"deepspeed": config, "use_cpu": False, "bf16": False}


def count_micro_batches(arguments: Any, rows: int) -> None:
    """Tell DeepSpeed the micro-batches of a step, of ``rows`` rows each; the Trainer gives it the entire step.

    DeepSpeed would else clip offloaded gradients by the norm of the last micro-batch.
    """
    config = arguments.hf_deepspeed_config.config
    config["train_micro_batch_size_per_gpu"] = rows
    config["gradient_accumulation_steps"] = arguments.per_device_train_batch_size // rows


def _allow_cpus() -> None:
    """Make accelerate use DeepSpeed on CPUs: several gloo processes without ``use_cpu``.

    With ``use_cpu`` it would silently ignore DeepSpeed, which also runs on CPUs.
    """
    os.environ["DS_ACCELERATOR"] = os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    use_gloo_on_cpus()


def unset_global_config() -> None:
    """Load later models unpartitioned; transformers would partition each while a stage-3 config is registered."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


Groups = list[list[torch.nn.Parameter]]
"""Parameters of an optimizer's groups, before DeepSpeed flattened them."""

MOMENTS = ("exp_avg", "exp_avg_sq")


def _link_states(optimizer: Any) -> None:
    """Create missing optimizer state and link it to the parameters again; DeepSpeed linked them before it existed."""
    zero = optimizer.optimizer
    # Stages 1 and 2 have one flat partition per group, stage 3 a list of partitions.
    flat = getattr(zero, "single_partition_of_fp32_groups", None)
    for partition in zero.fp32_partitioned_groups_flat if flat is None else flat:
        state = zero.optimizer.state[partition]
        for name in MOMENTS:
            state.setdefault(name, torch.zeros_like(partition))
        state.setdefault("step", torch.zeros(()))
    # Link again: DeepSpeed maps each parameter to its slice of the flat state.
    if flat is not None:
        link_optimizer_states(zero)


def full_optimizer_state(groups: Groups, optimizer: Any, step: int) -> dict[str, Any]:
    """Return AdamW's state in the format of a single process; call it in all processes."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_states(optimizer)
    state: dict[int, dict[str, torch.Tensor]] = {}
    described = []
    for parameters, group in zip(groups, optimizer.param_groups, strict=True):
        # A single process numbers parameters consecutively over all groups.
        numbers = range(len(state), len(state) + len(parameters))
        described.append({name: value for name, value in group.items() if name != "params"} | {"params": [*numbers]})
        for number, parameter in zip(numbers, parameters, strict=True):
            moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            # Stage 3 replaces the parameter's own shape by its partition's shape.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            state[number] = {name: value.detach().cpu().view(shape).clone() for name, value in moments.items()}
            # A single process stores the step with every parameter.
            state[number]["step"] = torch.tensor(float(step))
    return {"state": state, "param_groups": described}


def load_optimizer_state(groups: Groups, optimizer: Any, saved: dict[str, Any]) -> None:
    """Load the state that ``full_optimizer_state`` or a single process saved; call it in all processes."""
    from deepspeed.utils import safe_set_full_optimizer_state

    _link_states(optimizer)
    every = [parameter for parameters in groups for parameter in parameters]
    for number, values in saved["state"].items():
        for name in MOMENTS:
            safe_set_full_optimizer_state(every[number], values[name].to(every[number].device), name)
    # All parameters have the same step, which DeepSpeed stores once per partition.
    steps = [values["step"] for values in saved["state"].values()]
    for values in optimizer.optimizer.optimizer.state.values():
        if steps and "step" in values:
            values["step"] = torch.as_tensor(steps[0]).clone()
    for group, written in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in written.items() if name != "params"})


def sync_master_weights(groups: Groups) -> None:
    """Copy the model's weights, after a checkpoint was loaded, into DeepSpeed's float32 master copies."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter in (parameter for parameters in groups for parameter in parameters):
        # A partitioned parameter is empty here until all processes gather it.
        partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter] if partitioned else []):
            value = parameter.detach().float().clone()
        safe_set_full_fp32_param(parameter, value)


def clip_before_step(engine: Any, clip: Callable[[], None]) -> None:
    """Call ``clip`` before each step in place of DeepSpeed's own clipping; steps directly follow the backward pass."""
    engine.optimizer.clip_grad = 0.0
    step = engine.step

    def clipped_step(*args: Any, **kwargs: Any) -> Any:
        clip()
        return step(*args, **kwargs)

    engine.step = clipped_step


def clip_grad_norm(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients of some parameters to ``max_norm`` and return their scalar norm before.

    Call it in all processes.
    """
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    # safe_get_full_grad gathers a partitioned gradient, so the norm covers the full model.
    gradients = [(p, grad) for p in parameters if (grad := safe_get_full_grad(p)) is not None]
    if not gradients:
        return torch.zeros(())
    # The norm over several tensors is the norm of their norms.
    norm: torch.Tensor = torch.stack([grad.norm() for _, grad in gradients]).norm()
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for parameter, grad in gradients:
            safe_set_full_grad(parameter, grad * scale)
    return norm
