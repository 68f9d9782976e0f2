"""A trained model's weights under their plain transformers names, LoRA merged in on the way out.

The live model is never touched: merging in place and back rounds the base a little every time (30 % of the weights
changed after 20 cycles in bf16). Each merged matrix exists only while it is handed over. Left out: DoRA and adapters
other than LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

PEFT_PREFIX = "base_model.model."


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` for every weight and saved buffer of ``model``, as its plain counterpart names them.

    A tied head comes under both names. Tensors that LoRA leaves alone are the model's own, not copies; merged ones
    are float32. Raises ``ValueError`` for an adapter that cannot be merged by adding its delta.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield from model.state_dict().items()
        return
    deltas = _lora_layers(model)
    for full_name, tensor in model.state_dict().items():
        name = full_name.removeprefix(PEFT_PREFIX)
        if ".modules_to_save." in name:  # a head that trains in full beside the adapters
            module, _, rest = name.partition(".modules_to_save.")
            yield f"{module}.{rest.partition('.')[2]}", tensor
        elif ".base_layer." in name:
            module, _, leaf = name.rpartition(".base_layer.")
            layer = deltas.get(module)
            yield f"{module}.{leaf}", tensor if layer is None or leaf != "weight" else _merged(tensor, layer)
        elif ".original_module." not in name and ".lora_" not in name:
            yield name, tensor


def _lora_layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if any(getattr(module, "use_dora", {}).values()):
                raise ValueError(f"{name} is a DoRA layer; only LoRA can be merged by adding its delta.")
            found[name.removeprefix(PEFT_PREFIX)] = module
    return found


def _merged(base: torch.Tensor, layer: Any) -> torch.Tensor:
    """Base plus the scaled low-rank product of every active adapter, in float32 (arXiv 2106.09685, section 4.1)."""
    merged = base.float().clone()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A or adapter in getattr(layer, "lora_embedding_A", {}):
            merged += layer.get_delta_weight(adapter).float()
    return merged
