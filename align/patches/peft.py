"""Patches of peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align.patches.signatures import private_name

if TYPE_CHECKING:
    from torch import nn


def replace_lora_linear(model: nn.Module, replacement: type) -> None:
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


@contextmanager
def float32_adapters() -> Iterator[None]:
    """Inside, peft creates adapters in float32 on a base of any type, so both types of base start with equal adapters.

    peft draws initial values in float32 and moves them to the base's device *and type*, which rounds them below a base
    in bfloat16. The patch was written for peft 0.21.
    """
    path = "peft.tuners.tuners_utils:BaseTunerLayer"
    layers = private_name("peft", path)
    move = private_name("peft", f"{path}._move_adapter_to_device_of_base_layer", ["self", "adapter_name", "device"])
    read = private_name("peft", f"{path}._get_base_layer_device_and_dtype", ["self", "base_layer"])

    def move_to_device(self: Any, adapter_name: str, device: Any = None) -> None:
        self._get_base_layer_device_and_dtype = lambda base_layer: (read(self, base_layer)[0], None)
        try:
            move(self, adapter_name, device)
        finally:
            del self._get_base_layer_device_and_dtype

    layers._move_adapter_to_device_of_base_layer = move_to_device
    try:
        yield
    finally:
        layers._move_adapter_to_device_of_base_layer = move


def has_hooks(module: Any) -> bool:
    """Return True if a wrapper such as accelerate's has to see calls of a ``torch.nn.Module``.

    Reads four private attributes of torch's modules, for which there is no public accessor. The patch was written for
    torch 2.13.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
