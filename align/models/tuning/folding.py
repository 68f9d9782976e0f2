"""Adapters folded into the weights they stand beside, one layer at a time and never in the live model.

Plain LoRA adds its product. Every other method is folded by peft's own merge, on a copy of the one layer; a matrix in
4 bits is dequantized first. All in float32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

PEFT_PREFIX = "base_model.model."


def tuner_layers(model: Any) -> dict[str, Any]:
    """The layers that peft put in place of the model's own, by the plain name of the module they replaced."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@torch.no_grad()
def folded(layer: Any) -> dict[str, torch.Tensor]:
    """Weight, bias and buffers of the module that ``layer`` replaced, by name, its active adapters folded in.

    Matrices come in float32. Raises ``ValueError`` for a method that cannot be folded.
    """
    base = layer.get_base_layer()
    if _is_plain_lora(layer):
        merged = float_weight(base).clone()
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                merged += layer.get_delta_weight(adapter).float()
        return {**_leaves(base), "weight": merged}
    alone = copy.deepcopy(layer)
    if getattr(base.weight, "quant_state", None) is not None:
        _put_float(alone)
    try:
        alone.merge(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"{type(layer).__name__} cannot be folded into the weights: {error}") from None
    return _leaves(alone.get_base_layer())


def float_weight(module: Any) -> torch.Tensor:
    """The module's weight in float32, dequantized where it is kept in 4 bits."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        weight: torch.Tensor = module.weight.data.float()
        return weight
    from align.models.tuning.quantized import dequantized

    return dequantized(module)


def _leaves(module: Any) -> dict[str, torch.Tensor]:
    quantized = getattr(module.weight, "quant_state", None) is not None
    found = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    return {name: t for name, t in found.items() if "." not in name} if quantized else found


def _is_plain_lora(layer: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer) and not layer.lora_variant


def _put_float(layer: Any) -> None:
    """Make a copied LoRA layer on a 4-bit matrix one on a plain matrix, which peft merges without quantizing again."""
    from peft.tuners.lora.layer import Linear

    quantized = layer.get_base_layer()
    plain = torch.nn.Linear(quantized.in_features, quantized.out_features, quantized.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(float_weight(quantized), requires_grad=False)
    plain.bias = quantized.bias
    layer.base_layer = plain
    layer.__class__ = Linear
