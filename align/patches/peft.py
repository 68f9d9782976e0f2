"""Patches of peft."""

from __future__ import annotations

from typing import Any

from align.patches.signatures import private_name


def replace_lora_linear(model: Any, replacement: type) -> None:
    """Compute the LoRA layers of ``model`` on matrices by a subclass of peft's layer, in place.

    Swaps ``__class__`` of each ``peft.tuners.lora.layer.Linear``, so names, saving and merging stay peft's. peft's
    ``LoraConfig._register_custom_module`` (https://github.com/huggingface/peft/pull/1875) is private as well and only
    covers new adapters, not loaded adapters. The patch was written for peft 0.21.

    Args:
        model: A model with peft's layers.
        replacement: Subclass of peft's ``Linear`` without state of its own.
    """
    path = "peft.tuners.lora.layer:Linear"
    linear = private_name("peft", path)
    private_name("peft", f"{path}.forward", ["self", "x", "args", "kwargs"])
    for module in model.modules():
        if type(module) is linear and not module.fan_in_fan_out:
            module.__class__ = replacement


def has_hooks(module: Any) -> bool:
    """Return True if a wrapper such as accelerate's has to see calls of a ``torch.nn.Module``.

    Reads four private attributes of torch's modules, for which there is no public accessor. The patch was written for
    torch 2.13.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
